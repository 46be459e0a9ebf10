//! Placeholder entry point, replaced by the first real command.
fn main() {}
