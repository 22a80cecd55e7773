"""llama-fast plan: what a model takes of GPUs' memory, and how fast it could be."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import MODEL_HELP, AddCommand, positive

if TYPE_CHECKING:
    from ..checkpoint.formats import Format
    from ..config import LlamaConfig
    from ..plan.capacity import Plan
    from ..plan.roofline import Time

MODELS = ("8b", "70b", "405b")
_EXAMPLES = """examples:
  llama-fast plan --model 405b --gpu h200 --gpus 8 --context 131072 --batch 4 --quantize fp8
  llama-fast plan --gpu h100                       # a table of 8B, 70B and 405B
  llama-fast plan --model Llama-3.1-8B-Instruct --gpu rtx-4090 --quantize fp8 --kv-cache fp8
  llama-fast plan --model 70b --gpu memory=96,bandwidth=4,bf16=400,fp8=800,link=200 --plot 70b.svg

Nothing is run and no GPU is needed. Weights and cache are exact; 1 GiB a GPU for CUDA, and 1 GiB
more for NCCL, are assumed. Times are the least that data sheets allow: no kernel is faster. The
exit status is 1 if the model does not fit."""

_COLORS = {  # Okabe and Ito's, distinct with any color vision
    "weights": "#0072b2",
    "KV cache": "#e69f00",
    "activations": "#009e73",
    "logits": "#cc79a7",
    "rope table": "#56b4e9",
    "reserve": "#999999",
}


def add(command: AddCommand) -> None:
    from ..config import RECIPES
    from ..plan.gpus import GPUS

    parser = command("plan", run, "plan memory and least time on GPUs", _EXAMPLES)
    option = parser.add_argument
    option(
        "--model",
        metavar="NAME",
        help=f"{', '.join((*MODELS, MODEL_HELP))}, of which only the config is read; default: a "
        f"table of {', '.join(MODELS)}",
    )
    option("--gpu", default="h200", help=f"{', '.join(GPUS)}, or numbers; default %(default)s")
    option("--gpus", type=positive, metavar="N", help="default: the fewest that hold it")
    option(
        "--pp",
        type=positive,
        default=1,
        metavar="P",
        help="pipeline stages of N / P GPUs each, as vLLM has them; default %(default)s",
    )
    option("--context", type=positive, default=8192, help="tokens a sequence; default %(default)s")
    option("--batch", type=positive, default=1, help="sequences at once; default %(default)s")
    option("--quantize", choices=RECIPES, help="default: 16 bits")
    option("--kv-cache", choices=("fp8",), help="default: 16 bits")
    option("--json", action="store_true", help="print JSON")
    option("--plot", type=Path, metavar="FILE", help="draw each GPU's memory as .svg or .png")


def run(args: argparse.Namespace) -> int:
    from ..plan.capacity import plan
    from ..plan.gpus import named

    if args.plot and args.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot: got {args.plot}, want a name that ends in .svg or .png")
    plans, gpu = {}, named(args.gpu)
    for name in [args.model] if args.model else MODELS:
        config, stored = _model(name)
        plans[name] = plan(
            config,
            gpu,
            args.gpus,
            context=args.context,
            batch=args.batch,
            quantize=args.quantize,
            kv_cache=args.kv_cache,
            stages=args.pp,
            stored=stored,
        )
    if args.json:
        print(json.dumps([{"model": name, **_record(p)} for name, p in plans.items()], indent=2))
    elif args.model:
        print(_report(args.model, plans[args.model]))
    else:
        print(_table(plans))
    if args.plot:
        bars = {f"{name}\n{_gpus(p.rank.gpus)}": p for name, p in plans.items()}
        if args.model:
            bars = {_gpus(n): p.with_(gpus=n) for p in plans.values() for n in p.possible()}
        draw(args.plot, bars, args.model or "Llama 3.1")
    return 0 if all(p.fits for p in plans.values()) else 1


def _model(name: str) -> tuple[LlamaConfig, Format | None]:
    """Return a model's config, and its weights' format if they are in FP8 already."""
    from ..checkpoint.formats import read_format
    from ..config import LlamaConfig
    from ..hub import resolve

    if name in MODELS:
        return getattr(LlamaConfig, f"llama_3_1_{name}")(), None
    path = resolve(name)
    if not path.exists():
        raise ValueError(f"--model: got {name!r}, want {', '.join((*MODELS, MODEL_HELP))}")
    return LlamaConfig.from_pretrained(path), read_format(path) if path.is_dir() else None


def _record(p: Plan) -> dict[str, Any]:
    """Return a plan's figures in bytes and seconds, for JSON."""

    def times(t: Time) -> dict[str, Any]:
        return {**t._asdict(), "seconds": t.seconds, "bound": t.bound}

    return {
        "gpu": asdict(p.gpu),
        "gpus": p.rank.gpus,
        "stages": p.rank.stages,
        "context": p.context,
        "batch": p.batch,
        "quantize": p.rank.quantize,
        "kv_cache": p.rank.kv_cache,
        "fits": p.fits,
        "memory": p.memory,
        "capacity": p.capacity,
        "free": p.free,
        "max_context": p.max_context,
        "max_batch": p.max_batch,
        "fewest_gpus": p.fewest_gpus,
        "prefill": times(p.prefill),
        "decode": times(p.decode),
    }


def _gpus(n: int) -> str:
    return f"{n} GPU{'s' * (n > 1)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _fits(p: Plan) -> str:
    """Say whether a plan fits, and if not, what would."""
    if p.fits:
        return f"fits, {_gib(p.free)} free"
    others = p.others()
    would = "; any of these would fit: " + ", ".join(others) if others else "; nothing here fits"
    return f"does not fit: {_gib(-p.free)} a GPU are missing{would}"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _what(p: Plan) -> str:
    weights = f"{p.rank.quantize} weights" if p.rank.quantize else "16-bit weights"
    weights = "weights as stored, in FP8" if p.rank.stored else weights
    cache = "FP8 cache" if p.rank.kv_cache else "16-bit cache"
    return f"{weights}, {cache}, {p.batch} x {p.context:,} tokens"


def _report(name: str, p: Plan) -> str:
    from ..plan.gpus import NODE

    n = p.rank.gpus
    nodes = f" ({-(-n // NODE)} nodes)" if n > NODE else ""
    nodes += f" in {p.rank.stages} stages" if p.rank.stages > 1 else ""
    lines = [f"{name} on {n} x {p.gpu.name}{nodes}: {_what(p)}", "", "memory of each GPU"]
    lines += [f"  {kind:<14}{_gib(size):>12}" for kind, size in p.memory.items()]
    total = sum(p.memory.values())
    lines += [f"  {'total':<14}{_gib(total):>12} of {_gib(p.capacity)}", _fits(p), ""]
    if p.max_context:
        lines.append(f"largest context with batch {p.batch}: {p.max_context:,} tokens")
    if p.max_batch:
        lines.append(f"largest batch with {p.context:,} tokens: {p.max_batch:,} sequences")
    fewest = p.fewest_gpus
    lines.append(f"fewest GPUs that hold this: {fewest or 'none of the numbers that divide it'}")
    lines += [
        "",
        f"{'least time':<28}{'compute':>10}{'memory':>10}{'all-reduce':>12}{'in all':>10}",
    ]
    for what, t in ((f"prefill, {p.context:,} tokens", p.prefill), ("decode, a step", p.decode)):
        parts = f"{_duration(t.compute):>10}{_duration(t.memory):>10}{_duration(t.all_reduce):>12}"
        lines.append(f"  {what:<26}{parts}{_duration(t.seconds):>10}  bound by {t.bound}")
    lines.append(f"  at most {p.context / p.prefill.seconds:,.0f} prompt tokens/s, then {_rate(p)}")
    return "\n".join(lines)


def _rate(p: Plan) -> str:
    others = " with each batch in the pipeline" if p.rank.stages > 1 else ""
    return f"{p.batch / p.decode.seconds:,.0f} tokens/s{others}"


def _table(plans: dict[str, Plan]) -> str:
    first = next(iter(plans.values()))
    head = f"{'GPUs':>5}{'weights':>11}{'cache':>11}{'others':>10}{'free':>11}{'context':>9}"
    head += f"{'batch':>7}{'prefill':>9}{'a step':>9}"
    lines = [
        f"each {first.gpu.name}, {_gib(first.capacity)}: {_what(first)}",
        "",
        f"{'model':<8}{head}  bound by",
    ]
    for name, p in plans.items():
        m = p.memory
        others = sum(m.values()) - m["weights"] - m["KV cache"]
        sizes = f"{_gib(m['weights']):>11}{_gib(m['KV cache']):>11}{_gib(others):>10}"
        sizes += f"{_gib(p.free):>11}{p.max_context:>9,}{p.max_batch:>7,}"
        times = f"{_duration(p.prefill.seconds):>9}{_duration(p.decode.seconds):>9}"
        bounds = f"{p.prefill.bound}, {p.decode.bound}"
        lines.append(f"{name:<8}{p.rank.gpus:>5}{sizes}{times}  {bounds}")
    lines += ["", "memory of each GPU; context, batch: the largest with this batch, this context;"]
    lines += ["prefill of one prompt and a decoding step: the least time, and what bounds them"]
    lines += [f"{name}: {_fits(p)}" for name, p in plans.items() if not p.fits]
    return "\n".join(lines)


def draw(path: Path, plans: dict[str, Plan], title: str) -> None:
    """Draw stacked bars of each GPU's memory, with the capacity as a line."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--plot: {error}; pip install 'llama_fast[bench]'") from None
    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    first = next(iter(plans.values()))
    capacity = first.capacity / 2**30
    with plt.rc_context({"svg.hashsalt": "llama_fast", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(1.6 + 1.1 * len(plans), 4.2), layout="constrained")
        bottoms = [0.0] * len(plans)
        for kind, color in _COLORS.items():
            heights = [p.memory[kind] / 2**30 for p in plans.values()]
            axes.bar(list(plans), heights, 0.6, bottoms, color=color, label=kind)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
        axes.axhline(capacity, color="#b00020", label=f"{first.gpu.name}, {capacity:.1f} GiB")
        top = 1.6 * capacity  # a bar that is far too high is cut off
        for x, total in enumerate(bottoms):
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            at = min(total + top / 100, top * 0.95)
            axes.text(x, at, f"{total:.1f}", ha="center", va="bottom", bbox=box)
        axes.set(ylim=(0, top), ylabel="GiB a GPU", title=f"{title}: {_what(first)}")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        unstamped: Iterable[str] = ("Software",) if path.suffix == ".png" else ("Date", "Creator")
        figure.savefig(path, dpi=144, metadata=dict.fromkeys(unstamped))
        plt.close(figure)
