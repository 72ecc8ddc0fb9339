//! Kernel launches through `cuLaunchKernelEx`: clusters, programmatic dependent launch, dynamic shared memory.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use super::driver::{Function, Stream};
use super::error::During;
use super::tensor_map::TensorMap;
use super::{CudaError, DevicePtr};

/// Geometry and attributes of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory; above 48 KB the function must have been got with as many.
    pub shared: u32,
    /// Blocks of a cluster in x, y, z; all ones for none.
    pub cluster: [u32; 3],
    /// Programmatic dependent launch: the kernel may start while its predecessor in the stream still runs, and
    /// must execute `griddepcontrol.wait` before it touches anything that the predecessor reads or writes. In a
    /// captured graph this becomes a programmatic edge.
    pub pdl: bool,
}

impl LaunchConfig {
    /// A 1-D grid without shared memory, clusters or programmatic launch.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        LaunchConfig {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared: 0,
            cluster: [1, 1, 1],
            pdl: false,
        }
    }
}

/// One kernel parameter, by value.
#[derive(Debug, Clone)]
enum Arg {
    Word32([u8; 4]),
    Word64([u8; 8]),
    Words(Box<[i64]>),
    Map(TensorMap),
}

/// A kernel's parameters in their order. The types must be those of the kernel: nothing checks them at run time,
/// so launch lists are generated from the plan that the kernel was generated from.
#[derive(Debug, Clone, Default)]
pub struct Args(Vec<Arg>);

impl Args {
    /// No parameters yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device pointer.
    pub fn ptr(mut self, value: DevicePtr) -> Self {
        self.0.push(Arg::Word64(value.to_ne_bytes()));
        self
    }

    /// A 64-bit unsigned integer.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.push(Arg::Word64(value.to_ne_bytes()));
        self
    }

    /// A 32-bit unsigned integer.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.push(Arg::Word32(value.to_ne_bytes()));
        self
    }

    /// A 32-bit signed integer.
    pub fn i32(mut self, value: i32) -> Self {
        self.0.push(Arg::Word32(value.to_ne_bytes()));
        self
    }

    /// A float.
    pub fn f32(mut self, value: f32) -> Self {
        self.0.push(Arg::Word32(value.to_ne_bytes()));
        self
    }

    /// A structure of 8-byte integers, by value.
    pub fn words(mut self, value: &[i64]) -> Self {
        self.0.push(Arg::Words(value.into()));
        self
    }

    /// A `const __grid_constant__` tensor map.
    pub fn tensor_map(mut self, value: TensorMap) -> Self {
        self.0.push(Arg::Map(value));
        self
    }

    /// How many parameters there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn pointers(&self) -> Vec<*mut c_void> {
        let address = |arg: &Arg| match arg {
            Arg::Word32(bytes) => bytes.as_ptr().cast_mut().cast(),
            Arg::Word64(bytes) => bytes.as_ptr().cast_mut().cast(),
            Arg::Words(words) => words.as_ptr().cast_mut().cast(),
            Arg::Map(map) => ptr::from_ref(map).cast_mut().cast(),
        };
        self.0.iter().map(address).collect()
    }
}

/// Launches a kernel. The context must be current on the calling thread.
///
/// # Safety
/// `args` are the kernel's parameters in number, order and type, every pointer among them is valid for what the
/// kernel does with it until the stream has run it, and with `pdl` the kernel waits as described there.
///
/// # Errors
/// The driver refuses the configuration, which the message repeats; or an earlier kernel failed.
pub unsafe fn launch(
    stream: &Stream,
    function: &Function,
    config: &LaunchConfig,
    args: &Args,
) -> Result<(), CudaError> {
    let mut attributes = Vec::with_capacity(2);
    if config.cluster != [1, 1, 1] {
        let [x, y, z] = config.cluster;
        attributes.push(sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z },
            },
        });
    }
    if config.pdl {
        attributes.push(sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        });
    }
    let raw = sys::CUlaunchConfig {
        gridDimX: config.grid[0],
        gridDimY: config.grid[1],
        gridDimZ: config.grid[2],
        blockDimX: config.block[0],
        blockDimY: config.block[1],
        blockDimZ: config.block[2],
        sharedMemBytes: config.shared,
        hStream: stream.raw(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    let mut params = args.pointers();
    // SAFETY: configuration, attributes and parameters live until the call returns, and the driver copies them
    // before it does; what the kernel then does is the caller's contract.
    let code = unsafe {
        sys::cuLaunchKernelEx(&raw, function.raw(), params.as_mut_ptr(), ptr::null_mut())
    };
    code.result().during(|| {
        format!(
            "launching {} with grid {:?}, block {:?}, cluster {:?}, {} bytes of shared memory",
            function.name(),
            config.grid,
            config.block,
            config.cluster,
            config.shared
        )
    })
}
