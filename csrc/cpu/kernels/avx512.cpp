#define WIDTH 16
#define TABLE kernels_avx512
#define TABLE_NAME "avx512"
#include "kernels.inl"
