#define WIDTH 8
#define TABLE kernels_avx2
#define TABLE_NAME "avx2"
#include "kernels.inl"
