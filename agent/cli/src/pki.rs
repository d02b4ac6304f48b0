//! A certificate authority for small installations.
//!
//! ```text
//!   pki init   → DIR/ca.pem DIR/ca.key            keep ca.key off the nodes
//!   pki issue  → DIR/ROLE.pem DIR/ROLE.key DIR/ca.pem
//! ```
//!
//! What a certificate may do stands in its subject alternative names: the role
//! as `urn:dmlocal:role:ROLE`, the node as `urn:dmlocal:node:NAME`. Only agents
//! get certificates that a server may show.
//!
//! Private keys never exist in a file that others can read, are never printed,
//! and the key of a CA is never overwritten. There is no revocation: whoever
//! needs it runs a real CA and issues certificates with the same names.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use time::{Duration, OffsetDateTime};
use x509_parser::pem::parse_x509_pem;

use crate::{
    args::Role,
    error::{Failure, chain, reason},
};

const CA_DAYS: i64 = 3650;
const KEY_MODE: u32 = 0o600;
const CERTIFICATE_MODE: u32 = 0o644;

/// Why a certificate was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PkiError {
    /// A file that must not be replaced is there.
    #[error("{} exists and is not overwritten", .0.display())]
    Exists(PathBuf),
    /// A file cannot be read or written.
    #[error("{}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The CA's certificate and key cannot sign anything that would be accepted.
    #[error("{}: {why}", path.display())]
    Invalid {
        /// The file that is wrong.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Making the key or certificate failed.
    #[error("making the certificate")]
    Make(#[from] rcgen::Error),
}

impl From<PkiError> for Failure {
    fn from(error: PkiError) -> Failure {
        let text = chain(&error);
        match &error {
            PkiError::Exists(path) => {
                Failure::new(reason::PKI_EXISTS, text).with("path", path.display().to_string())
            }
            PkiError::File { path, .. } => {
                Failure::new(reason::PKI_FILES, text).with("path", path.display().to_string())
            }
            PkiError::Invalid { path, .. } => {
                Failure::new(reason::PKI_INVALID, text).with("path", path.display().to_string())
            }
            PkiError::Make(_) => Failure::new(reason::INTERNAL, text),
        }
    }
}

/// What a certificate is to say about its holder.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// What the holder may do.
    pub(crate) role: Role,
    /// The node the holder speaks for.
    pub(crate) node: Option<String>,
    /// IP addresses under which the holder can be reached.
    pub(crate) addresses: Vec<IpAddr>,
    /// Further host names under which the holder can be reached.
    pub(crate) dns: Vec<String>,
    /// Days from now for which the certificate holds.
    pub(crate) days: u32,
}

/// The files that a call has written.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Written {
    /// The CA's certificate.
    pub(crate) ca: PathBuf,
    /// The certificate.
    pub(crate) certificate: PathBuf,
    /// Its private key.
    pub(crate) key: PathBuf,
}

/// Makes a new CA in `dir`.
pub(crate) fn init(dir: &Path, name: &str) -> Result<Written, PkiError> {
    make_dir(dir)?;
    let certificate = dir.join("ca.pem");
    let key_file = dir.join("ca.key");
    for path in [&certificate, &key_file] {
        if path.symlink_metadata().is_ok() {
            return Err(PkiError::Exists(path.clone()));
        }
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params(name, CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let signed = params.self_signed(&key)?;
    // The key goes first: a certificate without its key looks like a finished
    // CA, a key without a certificate does not.
    write(&key_file, key.serialize_pem().as_bytes(), KEY_MODE, Existing::Refuse)?;
    write(&certificate, signed.pem().as_bytes(), CERTIFICATE_MODE, Existing::Refuse)?;
    Ok(Written { ca: certificate.clone(), certificate, key: key_file })
}

/// Issues a certificate of the CA in `ca_dir` into `out`. An older certificate
/// of the same role there is replaced.
pub(crate) fn issue(ca_dir: &Path, out: &Path, subject: &Subject) -> Result<Written, PkiError> {
    let (ca_pem, issuer) = read_ca(ca_dir)?;
    let role = subject.role.word();
    let mut params = params(&format!("dmlocal {role}"), i64::from(subject.days));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if subject.role == Role::Agent {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    let names = &mut params.subject_alt_names;
    names.push(SanType::URI(format!("urn:dmlocal:role:{role}").try_into()?));
    if let Some(node) = &subject.node {
        names.push(SanType::URI(format!("urn:dmlocal:node:{node}").try_into()?));
    }
    for name in subject.node.iter().chain(&subject.dns) {
        names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    names.extend(subject.addresses.iter().copied().map(SanType::IpAddress));

    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let signed = params.signed_by(&key, &issuer)?;

    make_dir(out)?;
    let written = Written {
        ca: out.join("ca.pem"),
        certificate: out.join(format!("{role}.pem")),
        key: out.join(format!("{role}.key")),
    };
    // Another CA's certificate must not vanish from beside its key.
    match fs::read(&written.ca) {
        Ok(present) if present == ca_pem.as_bytes() => {}
        Ok(_) => return Err(PkiError::Exists(written.ca)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            write(&written.ca, ca_pem.as_bytes(), CERTIFICATE_MODE, Existing::Refuse)?;
        }
        Err(source) => return Err(PkiError::File { path: written.ca, source }),
    }
    write(&written.key, key.serialize_pem().as_bytes(), KEY_MODE, Existing::Replace)?;
    write(&written.certificate, signed.pem().as_bytes(), CERTIFICATE_MODE, Existing::Replace)?;
    Ok(written)
}

/// What every certificate has in common. It is valid from yesterday on, because
/// the clocks of two nodes differ.
fn params(common_name: &str, days: i64) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = now - Duration::days(1);
    params.not_after = now + Duration::days(days);
    params
}

/// Reads a CA and refuses one whose signatures nobody would accept.
fn read_ca(dir: &Path) -> Result<(String, Issuer<'static, KeyPair>), PkiError> {
    let path = dir.join("ca.pem");
    let pem = read(&path)?;
    let key_path = dir.join("ca.key");
    let key = KeyPair::from_pem(&read(&key_path)?)
        .map_err(|_| PkiError::Invalid { path: key_path.clone(), why: "not a key".into() })?;
    let invalid = |why: &str| PkiError::Invalid { path: path.clone(), why: why.into() };
    let (_, block) = parse_x509_pem(pem.as_bytes()).map_err(|_| invalid("not a certificate"))?;
    let certificate = block.parse_x509().map_err(|_| invalid("not a certificate"))?;
    if !certificate.is_ca() {
        return Err(invalid("not the certificate of a CA"));
    }
    if !certificate.validity().is_valid() {
        return Err(invalid("not valid at this time"));
    }
    if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err(PkiError::Invalid { path: key_path, why: "not the key of ca.pem".into() });
    }
    let issuer = Issuer::from_ca_cert_pem(&pem, key)?;
    Ok((pem, issuer))
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File { path: path.to_owned(), source })
}

fn make_dir(dir: &Path) -> Result<(), PkiError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| PkiError::File { path: dir.to_owned(), source })
}

/// What happens to a file that is already there.
#[derive(Clone, Copy)]
enum Existing {
    Refuse,
    Replace,
}

/// Writes a whole file or nothing. The temporary file has its final mode from
/// its creation, so a key is never readable by others, not for a moment.
fn write(path: &Path, content: &[u8], mode: u32, existing: Existing) -> Result<(), PkiError> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", uuid::Uuid::new_v4()));
    let temporary = PathBuf::from(name);
    let written = (|| {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        match existing {
            Existing::Replace => fs::rename(&temporary, path),
            // Unlike a rename, a link fails when the name is taken.
            Existing::Refuse => {
                fs::hard_link(&temporary, path).and_then(|()| fs::remove_file(&temporary))
            }
        }
    })();
    written.map_err(|source| {
        // The temporary file may not exist; there is nothing more to undo.
        let _ = fs::remove_file(&temporary);
        match (existing, source.kind()) {
            (Existing::Refuse, io::ErrorKind::AlreadyExists) => PkiError::Exists(path.to_owned()),
            _ => PkiError::File { path: path.to_owned(), source },
        }
    })
}

#[cfg(test)]
mod test {
    use std::{
        fs,
        net::IpAddr,
        os::unix::fs::PermissionsExt as _,
        path::{Path, PathBuf},
    };

    use tempfile::tempdir;
    use x509_parser::prelude::{GeneralName, KeyUsage, Pem, X509Certificate};

    use super::{PkiError, Subject, init, issue, parse_x509_pem};
    use crate::args::Role;

    fn subject(role: Role) -> Subject {
        Subject { role, node: None, addresses: Vec::new(), dns: Vec::new(), days: 825 }
    }

    fn agent() -> Subject {
        Subject {
            node: Some("node-a".into()),
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            dns: vec!["node-a.example".into()],
            ..subject(Role::Agent)
        }
    }

    fn pem(path: &Path) -> Pem {
        parse_x509_pem(&fs::read(path).unwrap()).unwrap().1
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
        let Some(extension) = certificate.subject_alternative_name().unwrap() else {
            return Vec::new();
        };
        let name = |name: &GeneralName<'_>| match name {
            GeneralName::URI(uri) => (*uri).to_owned(),
            GeneralName::DNSName(name) => format!("DNS:{name}"),
            GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
                Ok(v4) => IpAddr::from(v4).to_string(),
                Err(_) => IpAddr::from(<[u8; 16]>::try_from(*bytes).unwrap()).to_string(),
            },
            other => panic!("{other}"),
        };
        extension.value.general_names.iter().map(name).collect()
    }

    fn usage(certificate: &X509Certificate<'_>) -> KeyUsage {
        *certificate.key_usage().unwrap().unwrap().value
    }

    fn listing(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_ca_may_sign_certificates_but_no_further_cas() {
        let dir = tempdir().unwrap();
        let written = init(dir.path(), "my CA").unwrap();
        let pem = pem(&written.certificate);
        let ca = pem.parse_x509().unwrap();
        assert_eq!(ca.subject().to_string(), "CN=my CA");
        assert!(usage(&ca).key_cert_sign() && !usage(&ca).digital_signature());
        let constraints = ca.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(0));
        assert_eq!(days(&ca), 1 + 3650);
        ca.verify_signature(None).unwrap();
    }

    fn days(certificate: &X509Certificate<'_>) -> i64 {
        let validity = certificate.validity();
        (validity.not_after.timestamp() - validity.not_before.timestamp()) / 86_400
    }

    #[test]
    fn a_certificate_names_role_node_and_addresses_and_is_signed_by_the_ca() {
        let dir = tempdir().unwrap();
        let ca = init(dir.path(), "CA").unwrap();
        let written = issue(dir.path(), &dir.path().join("a"), &agent()).unwrap();
        let (ca, leaf) = (pem(&ca.certificate), pem(&written.certificate));
        let (ca, leaf) = (ca.parse_x509().unwrap(), leaf.parse_x509().unwrap());
        let wanted = [
            "urn:dmlocal:role:agent",
            "urn:dmlocal:node:node-a",
            "DNS:node-a",
            "DNS:node-a.example",
            "10.0.0.1",
            "fd00::1",
        ];
        assert_eq!(names(&leaf), wanted);
        leaf.verify_signature(Some(ca.public_key())).unwrap();
        assert_eq!(leaf.issuer(), ca.subject());
        assert!(!leaf.is_ca());
        assert!(usage(&leaf).digital_signature() && !usage(&leaf).key_cert_sign());
        assert_eq!(days(&leaf), 1 + 825);
        let yesterday = time::OffsetDateTime::now_utc().unix_timestamp() - 86_400;
        assert!((leaf.validity().not_before.timestamp() - yesterday).abs() < 600);
    }

    #[test]
    fn only_agents_may_be_servers() {
        let dir = tempdir().unwrap();
        init(dir.path(), "CA").unwrap();
        for (subject, server) in
            [(agent(), true), (subject(Role::Driver), false), (subject(Role::Operator), false)]
        {
            let out = dir.path().join(subject.role.word());
            let written = issue(dir.path(), &out, &subject).unwrap();
            let pem = pem(&written.certificate);
            let leaf = pem.parse_x509().unwrap();
            let usage = leaf.extended_key_usage().unwrap().unwrap().value;
            assert_eq!((usage.client_auth, usage.server_auth), (true, server), "{subject:?}");
            assert_eq!(names(&leaf)[0], format!("urn:dmlocal:role:{}", subject.role.word()));
            assert_eq!(names(&leaf).len() > 1, server);
        }
    }

    #[test]
    fn keys_and_their_directories_are_private_and_nothing_else_is_left_behind() {
        let dir = tempdir().unwrap();
        let (ca_dir, out) = (dir.path().join("deep/ca"), dir.path().join("out"));
        let ca = init(&ca_dir, "CA").unwrap();
        let leaf = issue(&ca_dir, &out, &agent()).unwrap();
        assert_eq!((mode(&ca.key), mode(&leaf.key)), (0o600, 0o600));
        assert_eq!((mode(&ca_dir), mode(&out)), (0o700, 0o700));
        assert_eq!(listing(&ca_dir), ["ca.key", "ca.pem"]);
        assert_eq!(listing(&out), ["agent.key", "agent.pem", "ca.pem"]);
        assert_eq!(fs::read(&ca.ca).unwrap(), fs::read(&leaf.ca).unwrap());
    }

    #[test]
    fn a_ca_is_never_overwritten_not_even_half_of_one() {
        for name in ["ca.pem", "ca.key"] {
            let dir = tempdir().unwrap();
            fs::write(dir.path().join(name), "precious").unwrap();
            let refused = init(dir.path(), "CA").unwrap_err();
            assert!(matches!(refused, PkiError::Exists(_)), "{refused:?}");
            assert_eq!(listing(dir.path()), [name]);
            assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), "precious");
        }
    }

    #[test]
    fn issuing_again_replaces_the_certificate() {
        let dir = tempdir().unwrap();
        init(dir.path(), "CA").unwrap();
        // Beside the CA is as good a place as any other.
        let first = issue(dir.path(), dir.path(), &agent()).unwrap();
        let before = fs::read(&first.certificate).unwrap();
        let second = issue(dir.path(), dir.path(), &agent()).unwrap();
        assert_ne!(fs::read(&second.certificate).unwrap(), before);
        assert_eq!(mode(&second.key), 0o600);
    }

    #[test]
    fn another_cas_directory_is_not_issued_into() {
        let dir = tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        init(&one, "CA").unwrap();
        init(&two, "CA").unwrap();
        let refused = issue(&one, &two, &agent()).unwrap_err();
        assert!(matches!(refused, PkiError::Exists(_)), "{refused:?}");
        assert_eq!(listing(&two), ["ca.key", "ca.pem"]);
    }

    #[test]
    fn what_is_no_ca_cannot_issue() {
        let dir = tempdir().unwrap();
        let ca = dir.path().join("ca");
        init(&ca, "CA").unwrap();
        init(&dir.path().join("other"), "CA").unwrap();
        let leaf = issue(&ca, &dir.path().join("leaf"), &agent()).unwrap();
        let copy = |from: PathBuf, name: &str| fs::copy(from, ca.join(name)).unwrap();

        copy(dir.path().join("other/ca.key"), "ca.key");
        let refused = issue(&ca, dir.path(), &agent()).unwrap_err();
        assert!(refused.to_string().ends_with("not the key of ca.pem"), "{refused}");

        copy(leaf.certificate, "ca.pem");
        copy(leaf.key, "ca.key");
        let refused = issue(&ca, dir.path(), &agent()).unwrap_err();
        assert!(refused.to_string().ends_with("not the certificate of a CA"), "{refused}");

        fs::write(ca.join("ca.pem"), "nonsense").unwrap();
        let refused = issue(&ca, dir.path(), &agent()).unwrap_err();
        assert!(matches!(refused, PkiError::Invalid { .. }), "{refused:?}");

        let refused = issue(&dir.path().join("nowhere"), dir.path(), &agent()).unwrap_err();
        assert!(matches!(refused, PkiError::File { .. }), "{refused:?}");
    }
}
