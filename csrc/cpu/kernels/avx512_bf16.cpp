#define WIDTH 16
#define TABLE kernels_avx512_bf16
#define TABLE_NAME "avx512_bf16"
#include "kernels.inl"
