//! Errors with what was attempted, without what nobody can read.

use std::io;

use devicemapper::{DmError, errors};
use nix::errno::Errno;

/// Whether there is no such device.
pub(super) fn is_absent(error: &DmError) -> bool {
    matches!(error, DmError::Core(errors::Error::Ioctl(_, _, _, errno)) if **errno == Errno::ENXIO)
}

/// The error without the crate's dump of two ioctl headers.
pub(super) fn plain(error: &DmError) -> io::Error {
    match error {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => io::Error::from(**errno),
        DmError::Core(errors::Error::InvalidArgument(text)) => {
            io::Error::new(io::ErrorKind::InvalidInput, text.clone())
        }
        DmError::Core(_) | DmError::Dm(..) => io::Error::other(error.to_string()),
    }
}

/// The error with what was attempted.
pub(super) fn context(verb: &str, what: &str, error: &DmError) -> io::Error {
    describe(verb, what, plain(error))
}

/// Keeps the kind and says what was attempted.
pub(crate) fn describe(verb: &str, what: &str, error: io::Error) -> io::Error {
    let kind = match error.raw_os_error().map(Errno::from_raw) {
        // The kernel's "no such device" is our "not found".
        Some(Errno::ENXIO | Errno::ENODEV) => io::ErrorKind::NotFound,
        _ => error.kind(),
    };
    io::Error::new(kind, format!("{verb} {what}: {error}"))
}

/// The error, and that of undoing what it left half-done.
pub(super) fn with_undo(error: io::Error, undone: io::Result<()>) -> io::Error {
    match undone {
        Ok(()) => error,
        Err(undo) => {
            io::Error::new(error.kind(), format!("{error}; undoing it failed too: {undo}"))
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn errors_keep_their_kind_and_say_what_was_done() {
        let busy = describe("remove", "x", Errno::EBUSY.into());
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        assert!(busy.to_string().starts_with("remove x: "), "{busy}");
        assert_eq!(describe("a", "b", Errno::ENXIO.into()).kind(), io::ErrorKind::NotFound);
    }
}
