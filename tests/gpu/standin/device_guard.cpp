// What torch's C++ side asks of a GPU, and a torch without CUDA lacks: CUDA's hooks and its device
// guard. They do nothing. A rank has one device, with its number on the machine.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

static int read_number(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value ? std::atoi(value) : otherwise;
}

static int current() { return read_number("LOCAL_RANK", 0); }
static int count() { return read_number("LOCAL_WORLD_SIZE", 1); }

namespace at {

struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count(); }
  int getNumGPUs() const override { return count(); }
  DeviceIndex current_device() const override { return current(); }
  DeviceIndex getCurrentDevice() const override { return current(); }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return current(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return current(); }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void deviceSynchronize(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

// Autograd runs the backward of a device in a thread of the device's own, and asks the guard for it.
struct DeviceGuard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device device() const { return c10::Device(CUDA, current()); }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return count(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

c10::impl::DeviceGuardImplRegistrar registered(CUDA, new DeviceGuard());

}  // namespace
