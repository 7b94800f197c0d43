//! BareFlow as a Linux process: generate, bench, info.
fn main() {}
