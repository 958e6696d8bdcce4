// What the checks on a GPU need besides the kernels: a forward pass that takes its time, and memory
// of another process. Each function returns null, or what is wrong in words.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

const char* in_words(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ uint64_t now_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// Waits, and only then writes.
__global__ void write_late(uint32_t* to, const uint32_t* from, int64_t words, uint64_t wait_ns) {
  const uint64_t began = now_ns();
  while (now_ns() - began < wait_ns) __nanosleep(1000);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words;
       i += step) {
    to[i] = from[i];
  }
}

}  // namespace

extern "C" {

// Few blocks of threads: other kernels have room beside it.
const char* pd_write_late(
    uint32_t* to, const uint32_t* from, int64_t words, int64_t wait_ns, void* stream) {
  write_late<<<4, 256, 0, static_cast<cudaStream_t>(stream)>>>(
      to, from, words, static_cast<uint64_t>(wait_ns));
  return in_words(cudaGetLastError());
}

// The allocation that `base` begins becomes one that other processes may open by `handle`.
const char* pd_export(void* base, char handle[CUDA_IPC_HANDLE_SIZE]) {
  cudaIpcMemHandle_t made;
  const cudaError_t error = cudaIpcGetMemHandle(&made, base);
  if (error == cudaSuccess) memcpy(handle, &made, sizeof(made));
  return in_words(error);
}

const char* pd_open(const char handle[CUDA_IPC_HANDLE_SIZE], void** base) {
  cudaIpcMemHandle_t given;
  memcpy(&given, handle, sizeof(given));
  return in_words(cudaIpcOpenMemHandle(base, given, cudaIpcMemLazyEnablePeerAccess));
}

const char* pd_close(void* base) { return in_words(cudaIpcCloseMemHandle(base)); }

// Copies `count` stretches of device memory, in the order of the stream.
const char* pd_copy(
    const uint64_t* to, const uint64_t* from, const uint64_t* num_bytes, int64_t count,
    void* stream) {
  for (int64_t i = 0; i < count; ++i) {
    const cudaError_t error = cudaMemcpyAsync(
        reinterpret_cast<void*>(to[i]), reinterpret_cast<const void*>(from[i]), num_bytes[i],
        cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return in_words(error);
  }
  return nullptr;
}

}  // extern "C"
