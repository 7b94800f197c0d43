//! Links converged kernels into a JIT-free native image and audits it.
fn main() {}
