//! What `cargo xtask bench` measures, each figure a ratio within one run.
