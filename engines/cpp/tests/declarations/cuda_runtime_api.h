// What is used of CUDA's header, to compile without it.
#pragma once
typedef struct CUstream_st* cudaStream_t;
