// Runs CUDA kernels on a CPU, for tests. Every CUDA thread of a block is a fiber, and blocks run
// one after another. It replaces cuda_runtime.h's device side when an ordinary C++ compiler
// compiles a .cu file with -DLF_CUDA_EMULATOR.
//
// To find bugs, it behaves as badly as the hardware may:
//  - between two synchronizations the threads of a block run in an order shuffled by a seed, and
//    now and then one warp runs ahead of the others as far as it can;
//  - shared memory starts as NaN and ends at a page that faults;
//  - asynchronous copies poison their destination and land only when waited for (ptx.h);
//  - a barrier that not all threads reach, or lanes that meet in different warp instructions, end
//    in an error that names the place.
// It does not model speed, memory ordering weaker than program order, or register pressure.
#pragma once

#include "block.h"
#include "cuda_names.h"
#include "scheduler.h"
