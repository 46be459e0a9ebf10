//! The snapshot store, its server and its tools.
