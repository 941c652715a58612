/* The peak of one core in float32: twelve independent chains of fused multiply-adds in registers.

   Returns FLOPs done. The vector is the widest that the compiler's -march=native has. */

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

typedef float vector __attribute__((vector_size(BYTES)));

#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define START(i) vector a##i = factor + (float)i;
#define STEP(i) a##i = a##i * factor + shift;
#define ADD(i) sum += a##i;

double peak_flops(long rounds, float *result) {
  const vector factor = (vector){0} + 0.999f, shift = (vector){0} + 0.001f;
  vector sum = {0};
  CHAINS(START)
  for (long round = 0; round < rounds; ++round) {
    CHAINS(STEP)
    __asm__ volatile("" ::: "memory");
  }
  CHAINS(ADD)
  *result = sum[0];
  return 12.0 * 2.0 * (BYTES / 4) * (double)rounds;
}
