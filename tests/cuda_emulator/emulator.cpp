// The emulator's one global, and the switch between fibers.
#include "emulator.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl lf_emu_switch
lf_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#else
#error "the CUDA emulator switches fibers in x86-64 assembly; add this machine's"
#endif

namespace lf::emu {

int& multiprocessors() {
  static int n = 3;  // few, so that a test's small shapes take several rounds
  return n;
}

int64_t& blocks() {
  static int64_t n = 0;
  return n;
}

unsigned& seed() {
  static unsigned s = 0;
  return s;
}

}  // namespace lf::emu
