//! CUDA graphs: a whole step captured once and launched with one call.

use cudarc::driver::{result, sys};

use super::CudaError;
use super::driver::{Device, Stream, log_drop};
use super::error::During;

/// An instantiated graph. Everything its kernels point to must outlive it.
#[derive(Debug)]
pub struct Graph {
    exec: sys::CUgraphExec,
    nodes: usize,
    device: Device,
}

// SAFETY: a CUgraphExec may be used from any thread; `launch` takes `&self` and the driver serialises launches.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Captures what `submit` submits to `stream`, instantiates it and uploads it. Nothing runs meanwhile.
    /// Launches with programmatic dependent launch keep their programmatic edges.
    ///
    /// # Errors
    /// Any error of `submit`; work that cannot be captured.
    pub fn capture(
        stream: &Stream,
        submit: impl FnOnce(&Stream) -> Result<(), CudaError>,
    ) -> Result<Self, CudaError> {
        stream.device().bind()?;
        // Thread-local: other threads may allocate or compile while this one captures.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not capturing (capture is entered only here and always left below).
        unsafe { result::stream::begin_capture(stream.raw(), mode) }
            .during(|| "starting a capture".into())?;
        let submitted = submit(stream);
        // SAFETY: the capture was started above; it must be ended whatever `submit` returned.
        let captured = unsafe { result::stream::end_capture(stream.raw()) };
        // The first error is the cause: after it the driver only says that the capture was invalidated.
        if let Err(error) = submitted {
            if let Ok(graph) = captured {
                destroy(graph);
            }
            return Err(error);
        }
        let graph = captured.during(|| "ending a capture".into())?;
        let mut nodes = 0;
        // SAFETY: the graph is alive; a null list asks for the number only.
        let counted =
            unsafe { sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes) }.result();
        // SAFETY: the graph is alive.
        let exec =
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0)) };
        // An instantiated graph does not need its template.
        destroy(graph);
        counted.during(|| "counting a graph's nodes".into())?;
        let exec = exec.during(|| format!("instantiating a graph of {nodes} nodes"))?;
        let graph = Graph {
            exec,
            nodes,
            device: stream.device().clone(),
        };
        // SAFETY: both are alive. Without this the first launch would pay for it.
        unsafe { result::graph::upload(graph.exec, stream.raw()) }
            .during(|| "uploading a graph".into())?;
        Ok(graph)
    }

    /// Kernels, copies and fills in the graph.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Launches the graph.
    ///
    /// # Errors
    /// The driver refuses, or earlier work failed.
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both are alive; that what the kernels point to is alive is the contract of the type.
        unsafe { result::graph::launch(self.exec, stream.raw()) }
            .during(|| "launching a graph".into())
    }
}

fn destroy(graph: sys::CUgraph) {
    // SAFETY: the caller got it from a capture and does not use it again.
    log_drop("destroying a graph", unsafe {
        result::graph::destroy(graph)
    });
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: instantiated in `capture`, destroyed only here. The driver defers it past running launches.
        log_drop("destroying a graph", unsafe {
            result::graph::exec_destroy(self.exec)
        });
    }
}
