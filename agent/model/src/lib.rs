//! The pure heart of dmlocal: words, names, tables, the journal's records and
//! the planner. No clock, no I/O, no kernel: everything here can be run
//! thousands of times a second against a simulated world.

pub mod admit;
#[cfg(test)]
mod examples;
pub mod forget;
pub mod hydration;
pub mod name;
pub mod plan;
pub mod schedule;
pub mod seeding;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod table;
pub mod units;
pub mod volume;
#[cfg(test)]
mod walk;
