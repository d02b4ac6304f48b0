//! The story that `cargo xtask demo` tells: a volume moves while it is written.
