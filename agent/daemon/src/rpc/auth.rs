//! Who calls, and what they may do.
//!
//! Over TCP the caller is what its certificate's SAN URIs say:
//! `urn:dmlocal:role:ROLE`, and `urn:dmlocal:node:NAME` for an agent. The unix
//! socket is root's and counts as an operator.

use std::collections::HashMap;

use tonic::{
    Code, Request, Status,
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::status::with_reason;

const ROLE: &str = "urn:dmlocal:role:";
const NODE: &str = "urn:dmlocal:node:";

/// What a certificate entitles its holder to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The Cinder volume service: volumes and moves.
    Driver,
    /// A node's agent: only what was granted to that node.
    Agent,
    /// Administration.
    Operator,
}

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    roles: Vec<Role>,
    node: Option<String>,
}

impl Caller {
    /// Reads the caller off the connection.
    ///
    /// # Errors
    /// The connection shows neither root's socket nor a certificate.
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        if request.extensions().get::<UdsConnectInfo>().is_some() {
            return Ok(Self { roles: vec![Role::Operator], node: None });
        }
        let certificates = request
            .extensions()
            .get::<TlsConnectInfo<TcpConnectInfo>>()
            .and_then(TlsConnectInfo::peer_certs);
        match certificates.as_ref().and_then(|certificates| certificates.first()) {
            Some(certificate) => Ok(Self::from_der(certificate.as_ref())),
            None => Err(forbidden("no client certificate")),
        }
    }

    /// Reads the SAN URIs of a certificate whose chain has been verified;
    /// anything else in it counts for nothing.
    fn from_der(der: &[u8]) -> Self {
        let mut caller = Self { roles: Vec::new(), node: None };
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return caller };
        let Ok(Some(names)) = certificate.subject_alternative_name() else { return caller };
        for name in &names.value.general_names {
            let GeneralName::URI(uri) = name else { continue };
            match uri.strip_prefix(ROLE) {
                Some("driver") => caller.roles.push(Role::Driver),
                Some("agent") => caller.roles.push(Role::Agent),
                Some("operator") => caller.roles.push(Role::Operator),
                Some(_) | None => {}
            }
            if let Some(node) = uri.strip_prefix(NODE) {
                caller.node = Some(node.to_owned());
            }
        }
        caller
    }

    /// Whether the caller has one of these roles.
    ///
    /// # Errors
    /// It has none of them.
    pub(super) fn must_be(&self, roles: &[Role]) -> Result<(), Status> {
        if self.roles.iter().any(|role| roles.contains(role)) {
            return Ok(());
        }
        Err(forbidden(&format!("this call is for {roles:?}, the caller is {:?}", self.roles)))
    }

    /// The node whose grants the caller may act on; `None` for one that may act
    /// on any.
    ///
    /// # Errors
    /// An agent's certificate without a node.
    pub(super) fn acting_for(&self, any: &[Role]) -> Result<Option<String>, Status> {
        if self.roles.iter().any(|role| any.contains(role)) {
            return Ok(None);
        }
        self.must_be(&[Role::Agent])?;
        match &self.node {
            Some(node) => Ok(Some(node.clone())),
            None => Err(forbidden("an agent's certificate must name its node")),
        }
    }
}

fn forbidden(text: &str) -> Status {
    with_reason(Code::PermissionDenied, "ROLE_FORBIDDEN", text.to_owned(), HashMap::new())
}
