// Runs CUDA kernels on a CPU, for tests: every CUDA thread of a block is a fiber, and blocks run
// one after another. Included in place of cuda_runtime.h's device side when a .cu file is compiled
// by an ordinary C++ compiler with -DLF_CUDA_EMULATOR.
//
// What it is for is finding bugs, so it is as unkind as the hardware may be:
//  - between two synchronisations the threads of a block run in an order shuffled by a seed, and
//    one warp now and then runs ahead of the others as far as it can;
//  - shared memory starts as NaN, and ends at a page that faults;
//  - asynchronous copies poison their destination and land only when waited for (ptx.h);
//  - a barrier that not all threads reach, or lanes that meet in different warp instructions, end
//    in an error that names the place.
// It says nothing about speed, memory ordering weaker than program order, or registers.
#pragma once

#include "block.h"
#include "cuda_names.h"
#include "scheduler.h"
