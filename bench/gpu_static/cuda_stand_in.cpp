// Lets tensors without memory be on a CUDA device, backward passes included, in a torch that was built without one.
// It must be loaded before torch's Python module, which remembers for good whether there are CUDA hooks.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device first_device{c10::DeviceType::CUDA, 0};
const c10::Stream only_stream{c10::Stream::DEFAULT, first_device};

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return first_device; }
  c10::Device exchangeDevice(c10::Device /*device*/) const override { return first_device; }
  c10::Stream getStream(c10::Device /*device*/) const noexcept override { return only_stream; }
  c10::Stream exchangeStream(c10::Stream /*stream*/) const noexcept override { return only_stream; }
};

// Torch finds hooks by the name of their class.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs /*arguments*/) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex /*index*/) const override { return true; }
  // cuDNN decides the layout of what a convolution returns.
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 91900; }
  long versionRuntimeCuDNN() const override { return 91900; }
};

C10_REGISTER_GUARD_IMPL(CUDA, OneDevice)

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace
