//! Typed QEMU machines, repeated boots and the convergence report.
fn main() {}
