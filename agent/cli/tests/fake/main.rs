//! dmlocalctl as a process, against agents that exist only in this test.

mod agent;
mod commands;
mod hooks;
mod moves;
mod snapshots;
mod tls;
mod watching;
