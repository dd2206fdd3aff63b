// Elementwise updates of many tensors in one pass over memory.
//
// A kernel sees a list of tensors as rows: row i is one element range in each of its arrays (parameter, gradient,
// state, ...). The elements of all tensors, laid end to end, are cut into chunks that the threads claim one after the
// other. Every kernel rounds exactly where the torch operations that it stands for round: products are fused with sums
// in multiply_add only. Threads live for one call, so a process may fork at any time between calls.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

namespace {

constexpr int64_t kChunk = 1 << 15;  // elements that a thread claims at a time
constexpr int64_t kGrain = 1 << 16;  // elements for which one more thread pays
constexpr int kMostThreads = 64, kMostArrays = 8, kLanes = 16;

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// What exp needs of a type: adding `shift` leaves the nearest integer in the low bits; ln 2 = high + low.
template <typename T> struct Format;
template <> struct Format<float> {
  using Bits = uint32_t;
  static constexpr float shift = 12582912.0f, high = 0.693359375f, low = -2.1219444005469058e-4f, least = -87.0f;
  static constexpr Bits bias = 127, fraction = 23;
  static constexpr int degree = 7;
};
template <> struct Format<double> {
  using Bits = uint64_t;
  static constexpr double shift = 6755399441055744.0, high = 6.93147180369123816490e-01, low = 1.90821492927058770002e-10;
  static constexpr double least = -708.0;
  static constexpr Bits bias = 1023, fraction = 52;
  static constexpr int degree = 13;
};

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

// Taylor's series of exp to degree Last, by Horner's rule.
template <typename T, int Power, int Last> struct Series {
  static inline T at(T r) {
    return multiply_add(Series<T, Power + 1, Last>::at(r), r, static_cast<T>(1.0 / factorial(Power)));
  }
};
template <typename T, int Last> struct Series<T, Last, Last> {
  static inline T at(T) { return static_cast<T>(1.0 / factorial(Last)); }
};

// exp(x) for x <= 0 within about one unit in the last place; below `least` it is exp(least). NaN stays NaN.
template <typename T> inline T exp_negative(T x) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  x = x < F::least ? F::least : x;
  const T shifted = multiply_add(x, static_cast<T>(1.4426950408889634), F::shift);
  const T whole = shifted - F::shift;
  const T rest = multiply_add(whole, -F::low, multiply_add(whole, -F::high, x));
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + F::bias) << F::fraction;
  T power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return Series<T, 0, F::degree>::at(rest) * power;
}

template <typename T> inline T lerp(T from, T to, T weight) {
  const bool small = (weight < 0 ? -weight : weight) < static_cast<T>(0.5);
  return multiply_add(small ? weight : weight - 1, to - from, small ? from : to);
}

// A kernel moves n elements of the arrays whose first elements are at[...], and returns its share of a sum.
typedef double (*Kernel)(void *const *at, int64_t n, const double *scalars);

#define ARRAY(name, place) T *__restrict name = static_cast<T *>(at[place])
#define SCALAR(name, place) const T name = static_cast<T>(scalars[place])

template <typename T> double lion(void *const *at, int64_t n, const double *scalars) {
  ARRAY(param, 0); ARRAY(grad, 1); ARRAY(average, 2);
  SCALAR(lr, 0); SCALAR(keep, 1); SCALAR(beta1, 2); SCALAR(rest1, 3); SCALAR(beta2, 4); SCALAR(rest2, 5);
  for (int64_t i = 0; i < n; ++i) {
    const T g = grad[i], m = average[i];
    const T c = m * beta1 + g * rest1;
    const T step = c > 0 ? lr : (c < 0 ? -lr : T(0));
    param[i] = param[i] * keep - step;
    average[i] = m * beta2 + g * rest2;
  }
  return 0;
}

template <typename T> double diffgrad(void *const *at, int64_t n, const double *scalars) {
  ARRAY(param, 0); ARRAY(grad, 1); ARRAY(average, 2); ARRAY(square, 3); ARRAY(previous, 4);
  SCALAR(minus_step, 0); SCALAR(root, 1); SCALAR(eps, 2); SCALAR(rest1, 3); SCALAR(beta2, 4); SCALAR(rest2, 5);
  SCALAR(decay, 6);
  for (int64_t i = 0; i < n; ++i) {
    const T p = param[i], g = decay != 0 ? multiply_add(p, decay, grad[i]) : grad[i];
    const T m = lerp(average[i], g, rest1);
    const T v = multiply_add(g * rest2, g, square[i] * beta2);
    const T change = previous[i] - g;
    const T friction = 1 / (1 + exp_negative(change < 0 ? change : -change));
    previous[i] = g;
    average[i] = m;
    square[i] = v;
    param[i] = p + minus_step * (m * friction) / (square_root(v) / root + eps);
  }
  return 0;
}

template <typename T> double lerp_to(void *const *at, int64_t n, const double *scalars) {
  ARRAY(into, 0); ARRAY(value, 1);
  SCALAR(weight, 0);
  for (int64_t i = 0; i < n; ++i) into[i] = lerp(into[i], value[i], weight);
  return 0;
}

template <typename T> double add(void *const *at, int64_t n, const double *scalars) {
  ARRAY(into, 0); ARRAY(value, 1);
  SCALAR(alpha, 0);
  for (int64_t i = 0; i < n; ++i) into[i] = multiply_add(value[i], alpha, into[i]);
  return 0;
}

template <typename T> double scale(void *const *at, int64_t n, const double *scalars) {
  ARRAY(into, 0);
  SCALAR(factor, 0);
  for (int64_t i = 0; i < n; ++i) into[i] *= factor;
  return 0;
}

// Sums go through lanes of doubles: the same order on every machine, and vectors where the machine has them.
template <typename Term> inline double sum(int64_t n, Term term) {
  double lane[kLanes] = {}, total = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lane[k] += term(i + k);
  for (; i < n; ++i) total += term(i);
  for (int k = 0; k < kLanes; ++k) total += lane[k];
  return total;
}

template <typename T> double squares(void *const *at, int64_t n, const double *) {
  ARRAY(value, 0);
  return sum(n, [=](int64_t i) { const double x = value[i]; return x * x; });
}

template <typename T> double distance(void *const *at, int64_t n, const double *) {
  ARRAY(left, 0); ARRAY(right, 1);
  return sum(n, [=](int64_t i) { const double x = double(left[i]) - double(right[i]); return x * x; });
}

// Towards start + offset.
template <typename T> double approach(void *const *at, int64_t n, const double *scalars) {
  ARRAY(into, 0); ARRAY(start, 1); ARRAY(offset, 2);
  SCALAR(weight, 0);
  for (int64_t i = 0; i < n; ++i) into[i] = multiply_add(offset[i], weight, lerp(into[i], start[i], weight));
  return 0;
}

// A step of `into`; the squared length of `offset` after a step of its own, which is not taken.
template <typename T> double add_and_look(void *const *at, int64_t n, const double *scalars) {
  ARRAY(into, 0); ARRAY(value, 1); ARRAY(offset, 2);
  SCALAR(alpha, 0); SCALAR(other, 1);
  return sum(n, [=](int64_t i) {
    into[i] = multiply_add(value[i], alpha, into[i]);
    const double x = double(offset[i]) + double(other) * double(value[i]);
    return x * x;
  });
}

template <typename T> double add_squares(void *const *at, int64_t n, const double *scalars) {
  ARRAY(into, 0); ARRAY(value, 1);
  SCALAR(alpha, 0);
  return sum(n, [=](int64_t i) {
    const T moved = multiply_add(value[i], alpha, into[i]);
    into[i] = moved;
    return double(moved) * double(moved);
  });
}

const Kernel kKernels[][2] = {
    {lion<float>, lion<double>},       {diffgrad<float>, diffgrad<double>}, {lerp_to<float>, lerp_to<double>},
    {add<float>, add<double>},         {scale<float>, scale<double>},       {squares<float>, squares<double>},
    {distance<float>, distance<double>}, {approach<float>, approach<double>},
    {add_and_look<float>, add_and_look<double>}, {add_squares<float>, add_squares<double>},
};

struct Job {
  Kernel kernel;
  int64_t width;                // bytes of an element
  int arrays;
  int64_t tensors;
  char *const *table;           // table[array * tensors + tensor]
  const int64_t *starts;        // where tensors begin among all elements; tensors + 1 entries
  const double *scalars;
  double *sums;                 // one for each chunk
  int64_t chunks, next;
};

void *work(void *argument) {
  Job &job = *static_cast<Job *>(argument);
  for (;;) {
    const int64_t chunk = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (chunk >= job.chunks) return nullptr;
    const int64_t all = job.starts[job.tensors];
    const int64_t end = (chunk + 1) * kChunk < all ? (chunk + 1) * kChunk : all;
    int64_t low = 0, high = job.tensors;  // the tensor with starts[low] <= chunk * kChunk < starts[low + 1]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (job.starts[middle] <= chunk * kChunk ? low : high) = middle;
    }
    double total = 0;
    for (int64_t begin = chunk * kChunk; begin < end; ++low) {
      const int64_t stop = job.starts[low + 1] < end ? job.starts[low + 1] : end;
      void *at[kMostArrays];
      for (int k = 0; k < job.arrays; ++k)
        at[k] = job.table[k * job.tensors + low] + (begin - job.starts[low]) * job.width;
      total += job.kernel(at, stop - begin, job.scalars);
      begin = stop;
    }
    job.sums[chunk] = total;
  }
}

}  // namespace

// Runs a kernel over all elements on at most `threads` threads, and returns the sum of what it returned, which does not
// depend on the number of threads and is never negative. -1 says that there was no memory for the partial sums; nothing
// was moved then.
extern "C" double netwright_run(int kernel, int wide, int arrays, int64_t tensors, char *const *table,
                                const int64_t *starts, const double *scalars, int threads) {
  const int64_t all = starts[tensors];
  Job job = {kKernels[kernel][wide], wide ? 8 : 4, arrays, tensors, table, starts, scalars, nullptr, 0, 0};
  job.chunks = (all + kChunk - 1) / kChunk;
  job.sums = static_cast<double *>(calloc(job.chunks + 1, sizeof(double)));
  if (job.sums == nullptr) return -1;
  const int64_t useful = all / kGrain < kMostThreads ? all / kGrain : kMostThreads;
  pthread_t helpers[kMostThreads];
  int started = 0;
  if (threads > 1 && useful > 1) {
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 20);
    while (started + 1 < threads && started + 1 < useful) {
      if (pthread_create(&helpers[started], &small, work, &job) != 0) break;  // the others do its share
      ++started;
    }
    pthread_attr_destroy(&small);
  }
  work(&job);
  for (int k = 0; k < started; ++k) pthread_join(helpers[k], nullptr);
  double total = 0;
  for (int64_t k = 0; k < job.chunks; ++k) total += job.sums[k];
  free(job.sums);
  return total;
}
