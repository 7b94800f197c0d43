//! Build, test, demo and bench entry points.
fn main() {}
