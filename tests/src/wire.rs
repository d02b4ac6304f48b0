//! What the host and the program inside a node say to each other.
//!
//! One connection carries one command. The host sends a [`Request`], then the
//! command's standard input; the guest sends what the command prints, and last
//! how it ended. A host that hangs up before that has the command killed.
//!
//! Every message is a frame: a byte for its kind, four for its length (big
//! endian), then the bytes.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Where the program inside a node listens.
pub const PORT: u16 = 10077;

/// Frames longer than this are a sign of a stream that is out of step.
const LONGEST: usize = 1 << 20;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Host to guest: a [`Request`] as JSON.
    Request = 1,
    /// Host to guest: bytes for the command's standard input; none end it.
    Stdin = 2,
    /// Guest to host: bytes of the command's standard output.
    Stdout = 3,
    /// Guest to host: bytes of the command's standard error.
    Stderr = 4,
    /// Guest to host: a [`Status`] as JSON. Nothing follows it.
    Exited = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> io::Result<Kind> {
        [Kind::Request, Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::Exited]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or_else(|| io::Error::other(format!("no frame has the kind {byte}")))
    }
}

/// A command to run as root inside a node.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The program, looked up in `PATH`, and its arguments.
    pub argv: Vec<String>,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It returned this.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Status {
    /// What a shell would show in `$?`.
    pub fn code(self) -> i32 {
        match self {
            Status::Code(code) => code,
            Status::Signal(signal) => 128 + signal,
        }
    }
}

/// Sends one frame.
pub fn send(to: &mut impl Write, kind: Kind, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(5 + body.len());
    frame.push(kind as u8);
    frame.extend(length.to_be_bytes());
    frame.extend(body);
    to.write_all(&frame)
}

/// Receives one frame.
pub fn receive(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let kind = Kind::from_byte(head[0])?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > LONGEST {
        return Err(io::Error::other(format!("a frame of {length} bytes is too long")));
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    Ok((kind, body))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_frame_arrives_as_it_was_sent() {
        let mut stream = Vec::new();
        send(&mut stream, Kind::Stdout, b"dots").unwrap();
        send(&mut stream, Kind::Stdin, b"").unwrap();
        let mut stream = stream.as_slice();
        assert_eq!(receive(&mut stream).unwrap(), (Kind::Stdout, b"dots".to_vec()));
        assert_eq!(receive(&mut stream).unwrap(), (Kind::Stdin, Vec::new()));
        assert!(receive(&mut stream).is_err());
    }

    #[test]
    fn a_stream_out_of_step_is_noticed() {
        assert!(receive(&mut [9, 0, 0, 0, 0].as_slice()).is_err());
        assert!(receive(&mut [3, 255, 0, 0, 0].as_slice()).is_err());
    }
}
