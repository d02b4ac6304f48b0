//! Printing: tables for people, JSON for programs.

use std::io::{self, Write as _};

use serde::Serialize;

use crate::{
    args::Output,
    error::{Failure, reason},
};

/// Reports a failure on standard error.
pub(crate) fn failure(output: Output, failure: &Failure) {
    let text = match output {
        Output::Table => format!("error: {failure}"),
        // A failure holds only strings: it always serialises.
        Output::Json => serde_json::to_string(failure).unwrap_or_default(),
    };
    // Nothing is left to report to if this fails.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes to standard output at once. False: nobody reads it any more, which is
/// no failure.
pub(crate) fn print(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            Err(Failure::new(reason::OUTPUT_FAILED, format!("writing standard output: {error}")))
        }
    }
}

/// Writes a value to standard output as indented JSON.
pub(crate) fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<bool, Failure> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(reason::INTERNAL, format!("making JSON: {error}")))?;
    text.push('\n');
    print(&text)
}
