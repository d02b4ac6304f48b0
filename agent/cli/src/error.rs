//! Every failure as callers see it: a stable reason, a sentence, metadata.

use std::{collections::BTreeMap, error::Error as StdError, fmt};

use serde::Serialize;

/// Reasons that dmlocalctl itself gives; the daemon's come with its answers.
/// docs/cli.md explains each.
pub(crate) mod reason {
    /// The command line is wrong; the only reason with exit code 2.
    pub(crate) const USAGE: &str = "USAGE";
    /// An id that is not a lower-case UUID; the daemon answers the same word.
    pub(crate) const ID_INVALID: &str = "ID_INVALID";
    /// No connection to the endpoint came about.
    pub(crate) const ENDPOINT_UNREACHABLE: &str = "ENDPOINT_UNREACHABLE";
    /// The two ends do not accept each other's certificates.
    pub(crate) const TLS_REFUSED: &str = "TLS_REFUSED";
    /// The files for mutual TLS cannot be used.
    pub(crate) const TLS_FILES: &str = "TLS_FILES";
    /// The connection broke before the answer.
    pub(crate) const CONNECTION_LOST: &str = "CONNECTION_LOST";
    /// No answer within `--timeout`.
    pub(crate) const DEADLINE_EXCEEDED: &str = "DEADLINE_EXCEEDED";
    /// The endpoint answered with an error that carries no reason.
    pub(crate) const ANSWER_WITHOUT_REASON: &str = "ANSWER_WITHOUT_REASON";
    /// Source and destination are one node; the daemon answers the same word.
    pub(crate) const MOVE_TO_SELF: &str = "MOVE_TO_SELF";
    /// The destination may or may not have received the volume.
    pub(crate) const MOVE_UNCERTAIN: &str = "MOVE_UNCERTAIN";
    /// What was waited for will not come; the daemon answers the same word.
    pub(crate) const VOLUME_FAILED: &str = "VOLUME_FAILED";
    /// The daemon's word for a grant that is not there: nothing to revoke.
    pub(crate) const GRANT_UNKNOWN: &str = "GRANT_UNKNOWN";
    /// The daemon's word for a volume that is not there.
    pub(crate) const VOLUME_NOT_FOUND: &str = "VOLUME_NOT_FOUND";
    /// An id is taken by something else; the daemon answers the same word.
    pub(crate) const VOLUME_EXISTS: &str = "VOLUME_EXISTS";
    /// Files of a CA are there already and are never overwritten.
    pub(crate) const PKI_EXISTS: &str = "PKI_EXISTS";
    /// Certificate files cannot be read or written.
    pub(crate) const PKI_FILES: &str = "PKI_FILES";
    /// The CA's files do not make a CA.
    pub(crate) const PKI_INVALID: &str = "PKI_INVALID";
    /// Standard output or an output file cannot be written.
    pub(crate) const OUTPUT_FAILED: &str = "OUTPUT_FAILED";
    /// A fault of dmlocalctl itself.
    pub(crate) const INTERNAL: &str = "INTERNAL";
}

/// A failure; serialised, it is the JSON object on standard error.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Failure {
    /// A word in capitals that does not change between versions.
    pub(crate) reason: String,
    /// For people.
    pub(crate) message: String,
    /// What the reason is about.
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Failure {
    /// A failure without metadata.
    pub(crate) fn new(reason: &str, message: impl Into<String>) -> Failure {
        Failure { reason: reason.to_owned(), message: message.into(), metadata: BTreeMap::new() }
    }

    /// The same failure with one more entry of metadata.
    pub(crate) fn with(mut self, key: &str, value: impl Into<String>) -> Failure {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.reason)
    }
}

impl StdError for Failure {}

/// An error and its causes in one line; a cause that the line already says is
/// left out.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}
