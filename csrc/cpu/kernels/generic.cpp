#define WIDTH 4
#define TABLE kernels_generic
#define TABLE_NAME "generic"
#include "kernels.inl"
