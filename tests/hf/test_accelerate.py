"""accelerate(), restore() and report()."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import llama_fast as lf
from llama_fast.hf import linears, modules
from llama_fast.nn import FP8Linear

from .conftest import CLASSES, close, greedy, pair, prompt, tiny

RECIPES = [None, "fp8", "fp8_all", "fp8_ffn"]


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(prompt() if tokens is None else tokens).logits
    return out


def same_state(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def untouched(model: Any) -> bool:
    ours = (modules.Swapped, linears.PackedLinear, FP8Linear)
    return not any(isinstance(m, ours) for m in model.modules())


class TestInPlace:
    def test_returns_the_model_with_its_modules_and_parameters(self) -> None:
        model = tiny()
        held = dict(model.named_modules()), dict(model.named_parameters())
        assert lf.accelerate(model) is model
        assert held == (dict(model.named_modules()), dict(model.named_parameters()))
        layer = model.model.layers[0]
        assert isinstance(layer, transformers.models.llama.modeling_llama.LlamaDecoderLayer)
        assert type(layer).__name__ == "LlamaDecoderLayer"  # how accelerate finds it
        assert isinstance(layer.mlp.gate_proj, nn.Linear)

    @pytest.mark.parametrize("family", CLASSES)
    def test_every_layer_is_swapped(self, family: str) -> None:
        _, model = pair(family)
        for layer in model.model.layers:
            assert isinstance(layer, modules.DecoderLayer)
            with torch.no_grad():
                assert layer.self_attn.fused(torch.zeros(1, 128)) is not None
                assert layer.mlp.fused(torch.zeros(1, 128)) is not None

    def test_state_dict_is_the_untouched_model_s(self, tmp_path: Path) -> None:
        plain, fast = pair()
        assert fast.model.layers[0].mlp.down_proj.weight.dim() == 4
        assert same_state(plain, fast)
        fast.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert same_state(plain, loaded) and untouched(loaded)
        assert loaded.config._attn_implementation == "sdpa"  # the file does not name ours

    @pytest.mark.parametrize("assign", [False, True])
    def test_loads_a_state_dict(self, assign: bool) -> None:
        """With assign, weights come in the plain order and without fusion: correct, if slower."""
        _, fast = pair()
        torch.manual_seed(7)
        other = tiny()
        for p in other.parameters():
            p.data += 0.01 * torch.randn_like(p)
        fast.load_state_dict(other.state_dict(), assign=assign)
        close(logits(fast), logits(other))
        assert same_state(lf.accelerate(fast), other)
        assert fast.model.layers[0].mlp.down_proj.weight.dim() == 4
        close(logits(fast), logits(other))

    def test_twice(self) -> None:
        plain, fast = pair()
        lf.accelerate(fast)
        close(logits(fast), logits(plain))
        assert same_state(lf.restore(fast), plain) and untouched(fast)

    def test_other_models_are_untouched(self) -> None:
        """Even one that shares the config object."""
        first = tiny()
        second = transformers.LlamaForCausalLM(first.config).eval()
        before = logits(second)
        lf.accelerate(first)
        assert untouched(second) and torch.equal(logits(second), before)
        assert second.config._attn_implementation == "sdpa"
        assert type(tiny().model.norm).forward is not type(first.model.norm).forward

    def test_headless_and_classifier(self) -> None:
        for cls in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
            plain = tiny(cls=cls)
            fast = lf.accelerate(copy.deepcopy(plain))
            with torch.no_grad():
                close(fast(prompt())[0], plain(prompt())[0])
            assert same_state(lf.restore(fast), plain)

    def test_tied_head(self) -> None:
        """The embedding reads rows of the weight, so it stays in the plain order."""
        plain, fast = pair(tie_word_embeddings=True)
        assert fast.lm_head.weight is fast.model.embed_tokens.weight
        assert fast.lm_head.weight.dim() == 2
        close(logits(fast), logits(plain))
        assert torch.equal(greedy(fast, prompt()), greedy(plain, prompt()))


def test_import_is_quick_and_without_transformers(run_python: Any) -> None:
    """0.3 s of processor time beyond torch's; here 0.1."""
    run = run_python(
        "import sys, time, torch; start = time.process_time(); import llama_fast; "
        "print(time.process_time() - start, 'transformers' in sys.modules)"
    )
    seconds, imported = run.stdout.split()
    assert float(seconds) < 0.3 and imported == "False"


class TestArguments:
    def test_wrong(self) -> None:
        with pytest.raises(TypeError, match="model: got Linear"):
            lf.accelerate(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="quantize: got 'int4'"):
            lf.accelerate(tiny(), quantize="int4")
        with pytest.raises(ValueError, match="would freeze"):
            lf.accelerate(tiny().train(), quantize="fp8")
        with pytest.raises(ValueError, match="got 'fp8_ffn' for a model that is in 'fp8'"):
            lf.accelerate(lf.accelerate(tiny(), quantize="fp8"), quantize="fp8_ffn")

    def test_another_architecture(self) -> None:
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
        model = transformers.GPT2LMHeadModel(config).eval()
        with pytest.warns(UserWarning, match="nothing to accelerate"):
            lf.accelerate(model)
        assert {row.runs for row in lf.report(model) if "wte" in row.part} == {"transformers"}
        assert model(prompt(1) % 64).logits.shape == (1, 9, 64)


class TestQuantized:
    @pytest.mark.parametrize("quantize", RECIPES[1:])
    def test_logits_are_those_of_the_rounded_weights(self, quantize: str) -> None:
        plain, fast = pair(quantize=quantize)
        exact = logits(plain)
        for name, module in fast.named_modules():
            if isinstance(module, FP8Linear):
                plain.get_submodule(name).weight.data = module.dequantize()
        assert not torch.equal(logits(plain), exact)
        close(logits(fast), logits(plain))

    @pytest.mark.parametrize("quantize", RECIPES[1:])
    def test_which(self, quantize: str) -> None:
        _, fast = pair(quantize=quantize)
        fp8 = {n for n, m in fast.named_modules() if isinstance(m, FP8Linear)}
        every = {n for n, m in tiny().named_modules() if isinstance(m, nn.Linear)}
        want = {
            "fp8": every - {"lm_head"},
            "fp8_all": every,
            "fp8_ffn": {n for n in every if "layers.1.mlp" in n},
        }
        assert fp8 == want[quantize]
        bounds = {m.scale_ub for m in fast.modules() if isinstance(m, FP8Linear)}
        assert bounds == ({1200.0} if quantize == "fp8_ffn" else {None})

    @pytest.mark.parametrize("tied", [False, True])
    def test_saved_and_loaded(self, tied: bool, tmp_path: Path) -> None:
        _, fast = pair(quantize="fp8_all", tie_word_embeddings=tied)
        fast.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert isinstance(loaded.lm_head, FP8Linear)
        lf.accelerate(loaded)
        assert torch.equal(logits(loaded), logits(fast))
        # What was FP8 before stays so, without a checkpoint.
        assert isinstance(lf.restore(loaded).lm_head, FP8Linear)
        close(logits(loaded), logits(fast))

    def test_fused_before_and_after_a_move(self) -> None:
        _, fast = pair(quantize="fp8")
        before = logits(fast)
        nn.Module._apply(fast, lambda t: t.clone())
        assert torch.equal(logits(fast), before)
        with torch.no_grad():
            assert fast.model.layers[0].mlp.fused(torch.zeros(1, 128)) is not None


class TestRestore:
    @pytest.mark.parametrize("family", CLASSES)
    def test_bit_for_bit(self, family: str) -> None:
        plain, fast = pair(family)
        logits(fast)
        config = plain.config.to_dict()
        assert lf.restore(fast) is fast
        assert same_state(fast, plain) and untouched(fast)
        assert torch.equal(logits(fast), logits(plain))
        assert fast.config.to_dict() == config
        pointers = [p.untyped_storage().data_ptr() for p in fast.parameters()]
        assert len(set(pointers)) == len(pointers)  # no views of what was fused
        assert lf.restore(fast) is fast

    def test_fp8_reads_the_checkpoint(self, tmp_path: Path) -> None:
        plain = tiny()
        plain.save_pretrained(tmp_path)
        for cls in (transformers.LlamaForCausalLM, transformers.LlamaModel):
            want = cls.from_pretrained(tmp_path, dtype=torch.float32)
            model = cls.from_pretrained(tmp_path, dtype=torch.float32)
            lf.accelerate(model, quantize="fp8_all")
            assert not untouched(model)
            assert same_state(lf.restore(model), want) and untouched(model)
            assert not getattr(model, "is_quantized", False)

    def test_fp8_without_one(self, tmp_path: Path) -> None:
        _, fast = pair(quantize="fp8")
        before = logits(fast)
        with pytest.raises(ValueError, match="no folder to read them from"):
            lf.restore(fast)
        other = tiny()
        other.model.layers[1].mlp.up_proj.weight.data += 0.01
        other.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is not what was"):
            lf.restore(fast, tmp_path)
        assert torch.equal(logits(fast), before)  # nothing has changed
        tiny().save_pretrained(tmp_path)
        assert same_state(lf.restore(fast, tmp_path), tiny())


class TestReport:
    def test_content(self) -> None:
        _, fast = pair(quantize="fp8", tie_word_embeddings=True)
        rows = {row.part: row for row in lf.report(fast)}
        layer = "model.layers.*"
        assert rows[f"{layer}.self_attn"].modules == 3
        assert "attention_with_kvcache" in rows[f"{layer}.self_attn"].runs
        assert rows[f"{layer}.self_attn"].why == "q_proj|k_proj|v_proj as one product"
        assert rows[f"{layer}.mlp.down_proj"].runs == "fp8_linear (cpu)"
        assert rows["model.norm"].runs == "rms_norm (cpu)"
        assert rows[layer].runs == "add_rms_norm (cpu)"
        assert rows["lm_head"].runs == "transformers"
        assert rows["lm_head"].why == "another module has the same weight"
        text = str(lf.report(fast))
        assert text.splitlines()[0].split() == ["part", "modules", "runs", "on"]
        assert "another module has the same weight" in text

    def test_untouched(self) -> None:
        assert {row.runs for row in lf.report(tiny())} == {"transformers"}

    def test_follows_changes(self) -> None:
        _, fast = pair()
        fast.set_attn_implementation("sdpa")
        rows = {row.part: row for row in lf.report(fast)}
        assert rows["model.layers.*.self_attn"].why == "attn_implementation is 'sdpa'"
        close(logits(fast), logits(tiny()))


class TestWhatIsLeft:
    def test_hooks_keep_working(self) -> None:
        plain, fast = pair()
        seen: list[str] = []
        names = [
            "self_attn.q_proj",
            "self_attn.o_proj",
            "self_attn",
            "mlp.up_proj",
            "mlp",
            "input_layernorm",
            "post_attention_layernorm",
        ]
        layer = fast.model.layers[1]
        for name in names:
            layer.get_submodule(name).register_forward_hook(
                lambda *_, name=name: seen.append(name)  # type: ignore[misc]
            )
        close(logits(fast), logits(plain))
        assert sorted(seen) == sorted(names)
        lf.accelerate(fast)
        close(logits(fast), logits(plain))

    def test_a_linear_with_a_hook_is_left(self) -> None:
        plain = tiny()
        fast = copy.deepcopy(plain)
        fast.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
        lf.accelerate(fast)
        close(logits(fast), logits(plain))
        whys = [row.why for row in lf.report(fast)]
        assert "it has hooks" in whys and "not fused: q_proj is Linear" in whys

    def test_a_replaced_linear(self) -> None:
        """As peft does: the adapter's output counts."""
        plain, fast = pair()

        class Doubled(nn.Module):
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base = base

            def forward(self, x: Tensor) -> Tensor:
                return 2 * self.base(x)

        for model in (plain, fast):
            for layer in model.model.layers:
                layer.self_attn.v_proj = Doubled(layer.self_attn.v_proj)
                layer.mlp.up_proj = Doubled(layer.mlp.up_proj)
        close(logits(fast), logits(plain))
        lf.accelerate(fast)
        close(logits(fast), logits(plain))
        whys = [row.why for row in lf.report(fast)]
        assert any("Doubled" in why for why in whys)

    def test_another_activation(self) -> None:
        plain, fast = pair(hidden_act="gelu")
        close(logits(fast), logits(plain))
        whys = {row.part: row.why for row in lf.report(fast)}
        assert whys["model.layers.*.mlp"] == "its activation is not SiLU"

    def test_rows_that_cannot_be_packed(self) -> None:
        plain, fast = pair(num_key_value_heads=2, intermediate_size=200)
        assert fast.model.layers[0].self_attn.q_proj.weight.dim() == 2
        close(logits(fast), logits(plain))
        assert same_state(lf.restore(fast), plain)

    @pytest.mark.parametrize("quantize", [None, "fp8"])
    def test_offloaded(self, quantize: str | None) -> None:
        """accelerate's hooks keep weights on the meta device between calls."""
        cpu_offload = pytest.importorskip("accelerate").cpu_offload
        plain = tiny()
        before = copy.deepcopy(plain)
        cpu_offload(before, torch.device("cpu"))
        lf.accelerate(before, quantize)
        close(logits(before), logits(plain))
        assert any("forward is replaced" in row.why for row in lf.report(before))


class TestCopies:
    @pytest.mark.parametrize("quantize", [None, "fp8"])
    def test_deepcopy_and_pickle(self, quantize: str | None) -> None:
        plain, fast = pair(quantize=quantize)
        want = logits(fast)
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            torch.load(buffer, weights_only=False),
        ):
            assert torch.equal(logits(other), want)
            mlp = other.model.layers[0].mlp
            assert mlp._fused.weight.data_ptr() == mlp.gate_proj.weight.data_ptr()  # no second copy
            assert type(mlp) is type(fast.model.layers[0].mlp)
        if quantize is None:
            assert same_state(lf.restore(copy.deepcopy(fast)), plain)

    def test_to_another_dtype(self) -> None:
        plain, fast = pair()
        plain.bfloat16(), fast.bfloat16()
        assert same_state(plain, fast)
        mlp = fast.model.layers[0].mlp
        assert mlp._fused.weight.dtype == torch.bfloat16
        assert mlp._fused.weight.data_ptr() == mlp.gate_proj.weight.data_ptr()
        assert (logits(fast) - logits(plain)).norm() < 0.02 * logits(plain).norm()

    def test_autocast(self) -> None:
        plain, fast = pair()
        with torch.autocast("cpu", torch.bfloat16):
            got, want = logits(fast), logits(plain)
        assert got.dtype == want.dtype == torch.bfloat16
        assert (got.float() - want.float()).norm() < 0.03 * want.float().norm()


MEMORY = """
from collections.abc import Callable
from pathlib import Path
import torch
import llama_fast as lf
from tests.hf.conftest import tiny

def resident(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) << 10

def peak(run: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before

for quantize in (None, "fp8"):
    with torch.device("meta"):
        model = tiny(hidden_size=1024, intermediate_size=8448, num_hidden_layers=3)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.01)
    layer = sum(p.nbytes for p in model.model.layers[0].mlp.parameters())
    lf.accelerate(tiny(), quantize)  # loads what the first call needs
    for run in (lambda: torch.ones(layer // 4), lambda: lf.accelerate(model, quantize)):
        print(peak(run) / layer)
"""


def test_memory_never_exceeds_the_model_and_one_layer(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Matrices of 34 MB, which glibc returns to the system when they are freed, in a process of
    their own, plain and in FP8. A control shows that the measurement sees what is allocated."""
    figures = [*map(float, run_python(MEMORY).stdout.split())]
    assert len(figures) == 4
    for control, peak in zip(figures[::2], figures[1::2], strict=True):
        assert control > 0.9 and peak < 1
