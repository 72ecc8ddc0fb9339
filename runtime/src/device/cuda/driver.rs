//! Device, streams, events and modules over the driver API.
//!
//! cudarc's safe layer is not used: it tracks events for every slice, allocates from the driver's pool and cannot
//! launch with attributes. Everything here keeps its [`Device`] alive, whose primary context is current on a thread
//! after [`Device::bind`]; constructors and destructors bind by themselves, launches and copies do not.

use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::error::During;
use super::library::{self, Library};
use super::{CudaError, DevicePtr};

/// What is known of a device before anything runs on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceProperties {
    /// Its number.
    pub ordinal: usize,
    /// Marketing name.
    pub name: String,
    /// Compute capability (major, minor).
    pub compute_capability: (i32, i32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Highest SM clock in kHz.
    pub clock_khz: u32,
    /// Highest memory clock in kHz.
    pub memory_clock_khz: u32,
    /// Width of the memory bus in bits.
    pub memory_bus_bits: u32,
    /// Bytes of L2.
    pub l2_bytes: usize,
    /// Bytes of device memory.
    pub memory_bytes: usize,
    /// Shared memory that a block may ask for.
    pub shared_per_block: usize,
    /// Shared memory of an SM.
    pub shared_per_sm: usize,
    /// Driver version, major * 1000 + minor * 10.
    pub driver_version: i32,
}

/// A device with its primary context. Clones share it.
#[derive(Debug, Clone)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    raw: sys::CUdevice,
    context: sys::CUcontext,
    properties: DeviceProperties,
}

// SAFETY: a CUcontext may be used from any thread; the driver serialises what needs it.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// How many devices the driver reports.
///
/// # Errors
/// No driver, or a driver that fails to start.
pub fn device_count() -> Result<usize, CudaError> {
    library::ensure(Library::Driver)?;
    result::init().during(|| "starting the driver".into())?;
    let count = result::device::get_count().during(|| "counting devices".into())?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Properties of a device of any architecture, without creating a context on it.
///
/// # Errors
/// No driver, no such device.
pub fn properties(ordinal: usize) -> Result<DeviceProperties, CudaError> {
    read_properties(ordinal).map(|(_, properties)| properties)
}

/// The PCI address of a device, as in `00000000:1b:00.0`.
///
/// # Errors
/// No driver, no such device.
pub fn pci_address(ordinal: usize) -> Result<String, CudaError> {
    use sys::CUdevice_attribute as A;
    let (raw, _) = read_properties(ordinal)?;
    let what = || format!("reading the address of device {ordinal}");
    // SAFETY: `raw` is a device that the driver just gave.
    let get = |attribute| unsafe { result::device::get_attribute(raw, attribute) }.during(what);
    let [domain, bus, device] = [
        get(A::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
        get(A::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
        get(A::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
    ];
    Ok(format!("{domain:08x}:{bus:02x}:{device:02x}.0"))
}

fn read_properties(ordinal: usize) -> Result<(sys::CUdevice, DeviceProperties), CudaError> {
    use sys::CUdevice_attribute as A;
    let count = device_count()?;
    if ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    let what = || format!("reading the properties of device {ordinal}");
    let raw = result::device::get(ordinal as i32).during(what)?;
    // SAFETY: `raw` is a device that the driver just gave.
    let get = |attribute| unsafe { result::device::get_attribute(raw, attribute) }.during(what);
    let unsigned = |attribute| get(attribute).map(|v| u32::try_from(v).unwrap_or(0));
    let mut driver_version = 0;
    // SAFETY: the pointer is valid for a write.
    unsafe { sys::cuDriverGetVersion(&mut driver_version) }
        .result()
        .during(what)?;
    let properties = DeviceProperties {
        ordinal,
        name: result::device::get_name(raw).during(what)?,
        compute_capability: (
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sm_count: unsigned(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        clock_khz: unsigned(A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        memory_clock_khz: unsigned(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
        memory_bus_bits: unsigned(A::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
        l2_bytes: unsigned(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        // SAFETY: as for the attributes.
        memory_bytes: unsafe { result::device::total_mem(raw) }.during(what)?,
        shared_per_block: unsigned(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as usize,
        shared_per_sm: unsigned(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
            as usize,
        driver_version,
    };
    Ok((raw, properties))
}

impl Device {
    /// Opens a device and makes its context current on this thread.
    ///
    /// # Errors
    /// No driver, no such device, an architecture other than 9.0.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let (raw, properties) = read_properties(ordinal)?;
        let (major, minor) = properties.compute_capability;
        if (major, minor) != (9, 0) {
            return Err(CudaError::Architecture {
                ordinal,
                name: properties.name,
                major,
                minor,
            });
        }
        // SAFETY: `raw` is a device of the driver; released once, when the last clone goes.
        let context = unsafe { result::primary_ctx::retain(raw) }
            .during(|| format!("creating a context on device {ordinal}"))?;
        let device = Device(Arc::new(Inner {
            raw,
            context,
            properties,
        }));
        device.bind()?;
        Ok(device)
    }

    /// Makes the context current on the calling thread.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.0.context) }
            .during(|| "making a context current".into())
    }

    /// Properties of the device.
    pub fn properties(&self) -> &DeviceProperties {
        &self.0.properties
    }

    /// Free and total bytes of device memory, now.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.bind()?;
        result::mem_get_info().during(|| "asking for free memory".into())
    }

    /// Waits for everything on the device.
    ///
    /// # Errors
    /// Any error of work launched before.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        result::ctx::synchronize().during(|| "waiting for the device".into())
    }

    /// Loads a cubin.
    ///
    /// # Errors
    /// It is not a cubin for this device.
    pub fn load_module(&self, name: &str, cubin: &[u8]) -> Result<Module, CudaError> {
        self.bind()?;
        // SAFETY: a cubin is an ELF image with its own length; its bytes are alive during the call and the driver
        // copies what it keeps.
        let raw = unsafe { result::module::load_data(cubin.as_ptr().cast::<c_void>()) }
            .during(|| format!("loading module {name}"))?;
        Ok(Module(Arc::new(ModuleInner {
            raw,
            name: name.to_owned(),
            device: self.clone(),
        })))
    }

    /// A stream that does not wait for the default stream.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn stream(&self) -> Result<Stream, CudaError> {
        self.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)
            .during(|| "creating a stream".into())?;
        Ok(Stream {
            raw,
            device: self.clone(),
        })
    }

    /// An event; without timing it is cheaper to record.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn event(&self, timing: bool) -> Result<Event, CudaError> {
        use sys::CUevent_flags as F;
        self.bind()?;
        let flags = if timing {
            F::CU_EVENT_DEFAULT
        } else {
            F::CU_EVENT_DISABLE_TIMING
        };
        let raw = result::event::create(flags).during(|| "creating an event".into())?;
        Ok(Event {
            raw,
            device: self.clone(),
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; everything made in the context holds this object and is gone.
        let _ = unsafe { result::primary_ctx::release(self.raw) };
    }
}

/// Reports what a destructor cannot return. After an error that kills the context every call fails alike.
pub(super) fn log_drop(what: &str, outcome: Result<(), result::DriverError>) {
    if let Err(error) = outcome {
        tracing::debug!("CUDA: {what}: {error}");
    }
}

/// An ordered queue of work.
#[derive(Debug)]
pub struct Stream {
    raw: sys::CUstream,
    device: Device,
}

// SAFETY: a CUstream may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver serialises submissions.
unsafe impl Sync for Stream {}

impl Stream {
    /// The driver's handle.
    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// The stream's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits for the work submitted so far.
    ///
    /// # Errors
    /// Any error of that work.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.raw) }.during(|| "waiting for a stream".into())
    }

    /// Records the end of the work submitted so far.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both are alive and of one context.
        unsafe { result::event::record(event.raw, self.raw) }.during(|| "recording an event".into())
    }

    /// Work submitted from now on waits for an event.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive and of one context.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }
            .during(|| "waiting for an event".into())
    }

    /// Sets `count` 32-bit words to `value`.
    ///
    /// # Safety
    /// `dst` has `count` words on the device, 4-byte aligned, that nothing else uses until the stream has done it.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn fill_u32(
        &self,
        dst: DevicePtr,
        value: u32,
        count: usize,
    ) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { sys::cuMemsetD32Async(dst, value, count, self.raw) }
            .result()
            .during(|| "filling memory".into())
    }

    /// Copies from the host; asynchronous from pinned memory.
    ///
    /// # Safety
    /// `dst` has `src.len()` bytes on the device; `src` is unchanged and alive until the stream has done the copy.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn copy_to_device(&self, dst: DevicePtr, src: &[u8]) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { result::memcpy_htod_async(dst, src, self.raw) }
            .during(|| "copying to the device".into())
    }

    /// Copies to the host; asynchronous into pinned memory.
    ///
    /// # Safety
    /// `src` has `dst.len()` bytes on the device; `dst` is not touched and alive until the stream has done the copy.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { result::memcpy_dtoh_async(dst, src, self.raw) }
            .during(|| "copying to the host".into())
    }

    /// Copies within the device.
    ///
    /// # Safety
    /// Both ranges lie on the device, do not overlap and are not used otherwise until the stream has done the copy.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn copy_on_device(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: usize,
    ) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { result::memcpy_dtod_async(dst, src, bytes, self.raw) }
            .during(|| "copying on the device".into())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created by `Device::stream`, destroyed only here.
        log_drop("destroying a stream", unsafe {
            result::stream::destroy(self.raw)
        });
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    raw: sys::CUevent,
    device: Device,
}

// SAFETY: a CUevent may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Waits until the stream has reached the event; at once if it was never recorded.
    ///
    /// # Errors
    /// Any error of the work before it.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.raw) }.during(|| "waiting for an event".into())
    }

    /// Whether the stream has reached the event.
    ///
    /// # Errors
    /// Any error of the work before it.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.raw) } {
            Err(result::DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            other => other.during(|| "asking for an event".into()).map(|()| true),
        }
    }

    /// Milliseconds from `start` to this event, both with timing and reached.
    ///
    /// # Errors
    /// One of them is not reached or has no timing.
    pub fn elapsed_ms(&self, start: &Event) -> Result<f32, CudaError> {
        // SAFETY: both events are alive.
        unsafe { result::event::elapsed(start.raw, self.raw) }.during(|| "reading a time".into())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created by `Device::event`, destroyed only here.
        log_drop("destroying an event", unsafe {
            result::event::destroy(self.raw)
        });
    }
}

/// A loaded cubin. Clones share it.
#[derive(Debug, Clone)]
pub struct Module(Arc<ModuleInner>);

#[derive(Debug)]
struct ModuleInner {
    raw: sys::CUmodule,
    name: String,
    device: Device,
}

// SAFETY: a CUmodule may be used from any thread.
unsafe impl Send for ModuleInner {}
// SAFETY: as above.
unsafe impl Sync for ModuleInner {}

impl Module {
    /// A kernel of the module that may use `shared` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// No such kernel; more shared memory than a block can have.
    pub fn function(&self, kernel: &str, shared: u32) -> Result<Function, CudaError> {
        use sys::CUfunction_attribute_enum as A;
        self.0.device.bind()?;
        let what = || format!("finding kernel {kernel} in module {}", self.0.name);
        let name = CString::new(kernel)
            .map_err(|_| result::DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE))
            .during(what)?;
        // SAFETY: the module is alive.
        let raw = unsafe { result::module::get_function(self.0.raw, name) }.during(what)?;
        // 48 KB need no asking.
        if shared > 48 << 10 {
            let attribute = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is alive as long as its module.
            unsafe { result::function::set_function_attribute(raw, attribute, shared as i32) }
                .during(|| format!("giving kernel {kernel} {shared} bytes of shared memory"))?;
        }
        Ok(Function {
            raw,
            name: kernel.into(),
            module: self.clone(),
        })
    }
}

impl Drop for ModuleInner {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: loaded once, unloaded only here; all functions hold this object.
        log_drop("unloading a module", unsafe {
            result::module::unload(self.raw)
        });
    }
}

/// A kernel, ready to launch. Keeps its module loaded.
#[derive(Debug, Clone)]
pub struct Function {
    raw: sys::CUfunction,
    name: Arc<str>,
    module: Module,
}

// SAFETY: a CUfunction may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// The driver's handle.
    pub fn raw(&self) -> sys::CUfunction {
        self.raw
    }

    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Blocks of `threads` threads with `shared` bytes of dynamic shared memory that one SM holds at once.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn blocks_per_sm(&self, threads: u32, shared: u32) -> Result<u32, CudaError> {
        self.module.0.device.bind()?;
        let mut blocks = 0;
        // SAFETY: the function is alive and the pointer valid for a write.
        let code = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ptr::from_mut(&mut blocks),
                self.raw,
                threads as i32,
                shared as usize,
            )
        };
        code.result()
            .during(|| format!("asking for the occupancy of {}", self.name))?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }
}
