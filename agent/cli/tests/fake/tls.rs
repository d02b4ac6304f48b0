//! Mutual TLS with certificates that `dmlocalctl pki` has made.

use std::{fs, path::Path};

use crate::agent::{Log, Ran, dmlocalctl, pki, tls};
use tempfile::tempdir;

/// Asks for the status with the files of `own`, trusting the CA of `trusted`.
fn ask(endpoint: &str, trusted: &Path, own: &Path, role: &str) -> Ran {
    dmlocalctl()
        .args(["--output", "json", "--endpoint", endpoint, "status"])
        .arg("--ca")
        .arg(trusted.join("ca.pem"))
        .arg("--cert")
        .arg(own.join(format!("{role}.pem")))
        .arg("--key")
        .arg(own.join(format!("{role}.key")))
        .output()
        .unwrap()
        .into()
}

fn ca_arg(ca: &Path) -> String {
    format!("--ca-dir={}", ca.display())
}

#[test]
fn an_operator_and_an_agent_of_one_ca_trust_each_other_and_no_one_else() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let ca = pki(dir, "ca", &["init"]);
    let from = ca_arg(&ca);
    let agent_args = ["issue", &from, "--role=agent", "--node=node-a", "--address=127.0.0.1"];
    let agent = pki(dir, "agent", &agent_args);
    let operator = pki(dir, "operator", &["issue", &from, "--role=operator"]);
    let foreign_ca = pki(dir, "foreign-ca", &["init"]);
    let foreign = pki(dir, "foreign", &["issue", &ca_arg(&foreign_ca), "--role=operator"]);

    let server = tls(&agent, "agent", &Log::default());
    let here = server.endpoint.as_str();
    assert_eq!(ask(here, &operator, &operator, "operator").json().as_array().unwrap().len(), 2);
    assert_eq!(ask(here, &agent, &agent, "agent").json().as_array().unwrap().len(), 2);

    let refused = [
        ("a client that trusts another CA", ask(here, &foreign, &operator, "operator")),
        ("a client of another CA", ask(here, &operator, &foreign, "operator")),
        (
            "a server under a name that is not its own",
            ask(&here.replace("127.0.0.1", "localhost"), &operator, &operator, "operator"),
        ),
    ];
    for (who, ran) in refused {
        assert_eq!(ran.failure()["reason"], "TLS_REFUSED", "{who}: {ran:?}");
    }
}

#[test]
fn an_operators_certificate_is_no_servers_certificate() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let ca = pki(dir, "ca", &["init"]);
    let args = ["issue", &ca_arg(&ca), "--role=operator", "--address=127.0.0.1"];
    let operator = pki(dir, "operator", &args);
    let server = tls(&operator, "operator", &Log::default());
    let ran = ask(&server.endpoint, &operator, &operator, "operator");
    assert_eq!(ran.failure()["reason"], "TLS_REFUSED");
}

#[test]
fn files_that_are_missing_or_wrong_are_named() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let ca = pki(dir, "ca", &["init"]);
    let own = pki(dir, "own", &["issue", &ca_arg(&ca), "--role=operator"]);
    // Nothing listens there: the files are looked at first.
    let ran = ask("https://127.0.0.1:1", &dir.join("nowhere"), &own, "operator");
    let failure = ran.failure();
    assert_eq!(failure["reason"], "TLS_FILES");
    assert_eq!(failure["metadata"]["path"], dir.join("nowhere/ca.pem").display().to_string());
    fs::write(own.join("operator.key"), "no key").unwrap();
    let ran = ask("https://127.0.0.1:1", &own, &own, "operator");
    assert_eq!(ran.failure()["reason"], "TLS_FILES");
}

#[test]
fn a_port_without_an_agent_is_unreachable() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let ca = pki(dir, "ca", &["init"]);
    let own = pki(dir, "own", &["issue", &ca_arg(&ca), "--role=operator"]);
    let ran = ask("https://127.0.0.1:1", &own, &own, "operator");
    assert_eq!(ran.failure()["reason"], "ENDPOINT_UNREACHABLE");
}

/// The rejection reaches the client only sometimes: the server closes the
/// connection without having read the call.
#[test]
fn a_client_of_another_ca_always_learns_that_it_is_not_trusted() {
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let ca = pki(dir, "ca", &["init"]);
    let agent_args = ["issue", &ca_arg(&ca), "--role=agent", "--node=a", "--address=127.0.0.1"];
    let agent = pki(dir, "agent", &agent_args);
    let foreign_ca = pki(dir, "foreign-ca", &["init"]);
    let foreign = pki(dir, "foreign", &["issue", &ca_arg(&foreign_ca), "--role=operator"]);
    fs::copy(ca.join("ca.pem"), foreign.join("ca.pem")).unwrap();
    let log = Log::default();
    let server = tls(&agent, "agent", &log);
    for _ in 0..50 {
        let ran = ask(&server.endpoint, &foreign, &foreign, "operator");
        assert_eq!(ran.failure()["reason"], "TLS_REFUSED", "{ran:?}");
    }
    assert_eq!(*log.lock().unwrap(), [] as [&str; 0]);
}
