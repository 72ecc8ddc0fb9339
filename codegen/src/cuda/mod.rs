//! CUDA C: kernel text and launch geometry. Nothing here knows the driver.

pub mod random_weights;
