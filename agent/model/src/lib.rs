//! The pure heart of dmlocal: words, names, tables, the journal's records and
//! the planner. No clock, no I/O, no kernel: everything here can be run
//! thousands of times a second against a simulated world.

pub mod name;
pub mod table;
pub mod units;
