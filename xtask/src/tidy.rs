//! The conventions of this repository that no other tool knows.
//!
//! Each rule looks at the tracked files and names every place that breaks it.
//! Exceptions stand in `xtask/tidy-exceptions`, each with its argument, and one
//! that nothing needs any more is itself an offence.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use dmlocal_testbed::repository;

/// Longer files are hard to take in.
const LINES: usize = 500;

/// A tracked text file.
struct Source {
    path: String,
    text: String,
}

/// What a rule has to say about a place.
struct Offence {
    rule: &'static str,
    path: String,
    line: usize,
    what: String,
}

/// Checks every rule.
pub(crate) fn check() -> Result<()> {
    let sources = tracked()?;
    let mut offences = Vec::new();
    for source in &sources {
        length(source, &mut offences);
        links(source, &mut offences);
        for (index, line) in source.text.lines().enumerate() {
            for (rule, what) in offences_in_line(&source.path, line) {
                offences.push(Offence { rule, path: source.path.clone(), line: index + 1, what });
            }
        }
    }
    model_is_pure(&sources, &mut offences);
    mirrors(&sources, &mut offences)?;
    report(offences)
}

fn tracked() -> Result<Vec<Source>> {
    let list = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(repository())
        .output()
        .context("starting git")?;
    ensure!(list.status.success(), "git: {}", String::from_utf8_lossy(&list.stderr));
    let paths = String::from_utf8(list.stdout).context("a path is not UTF-8")?;
    // What is neither there any more nor text has nothing to say.
    Ok(paths
        .split('\0')
        .filter_map(|path| {
            let text = fs::read_to_string(repository().join(path)).ok()?;
            Some(Source { path: path.to_owned(), text })
        })
        .collect())
}

fn length(source: &Source, offences: &mut Vec<Offence>) {
    let lines = source.text.lines().count();
    if lines > LINES && [".rs", ".py", ".proto", ".sh"].iter().any(|end| source.path.ends_with(end))
    {
        let what = format!("{lines} lines are more than {LINES}");
        offences.push(Offence { rule: "length", path: source.path.clone(), line: 1, what });
    }
}

/// The rules that one line can break.
fn offences_in_line(path: &str, line: &str) -> Vec<(&'static str, String)> {
    let mut offences = Vec::new();
    if !path.ends_with(".rs") || path == "xtask/src/tidy.rs" {
        return offences;
    }
    let code = line.split("//").next().unwrap_or_default();
    let has = |words: &[&str]| words.iter().any(|word| code.contains(word));
    if has(&["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait"]) {
        offences.push(("unsafe", "`unsafe` has one place in the daemon".to_owned()));
    }
    if path.starts_with("agent/daemon/")
        && path != "agent/daemon/src/kernel/exec.rs"
        && has(&["process::Command", "Command::new"])
    {
        offences.push(("command", "only kernel/exec.rs starts other programs".to_owned()));
    }
    let converts = code.contains("impl") && code.contains("From<") && code.contains("v1::");
    if path.starts_with("agent/daemon/src/")
        && !path.starts_with("agent/daemon/src/rpc/")
        && converts
    {
        offences.push(("conversion", "only rpc/ converts what travels".to_owned()));
    }
    if has(&["todo!", "unimplemented!"]) || line.contains("FIXME") {
        offences.push(("unfinished", "this is not finished".to_owned()));
    }
    offences
}

/// The model knows nothing of the world outside.
fn model_is_pure(sources: &[Source], offences: &mut Vec<Offence>) {
    const FORBIDDEN: [&str; 4] = ["libc", "nix", "tokio", "tonic"];
    let path = "agent/model/Cargo.toml";
    let Some(manifest) = sources.iter().find(|source| source.path == path) else { return };
    let mut section = "";
    for (index, line) in manifest.text.lines().enumerate() {
        if line.starts_with('[') {
            section = line;
        }
        let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
        if section == "[dependencies]" && FORBIDDEN.contains(&name) {
            let what = format!("the model depends on {name}");
            offences.push(Offence { rule: "model", path: path.into(), line: index + 1, what });
        }
    }
}

/// Relative links in documents lead somewhere.
fn links(source: &Source, offences: &mut Vec<Offence>) {
    if !source.path.ends_with(".md") {
        return;
    }
    let file = repository().join(&source.path);
    for (index, line) in source.text.lines().enumerate() {
        for rest in line.split("](").skip(1) {
            let target = rest.split([')', '#', ' ']).next().unwrap_or_default();
            let elsewhere = target.is_empty() || target.contains(':');
            if !elsewhere && !file.with_file_name(target).exists() {
                let what = format!("`{target}` does not exist");
                offences.push(Offence {
                    rule: "link",
                    path: source.path.clone(),
                    line: index + 1,
                    what,
                });
            }
        }
    }
}

/// Which mirrors a machine uses is its own affair: no file names them.
fn mirrors(sources: &[Source], offences: &mut Vec<Offence>) -> Result<()> {
    let list = ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"];
    let uris = match Command::new("apt-get").args(list).output() {
        Ok(output) => String::from_utf8(output.stdout).context("APT's sources")?,
        Err(error) => {
            println!("no check for names of mirrors: this machine has no apt-get ({error})");
            return Ok(());
        }
    };
    let hosts: BTreeSet<&str> = uris
        .lines()
        .filter_map(|uri| uri.split_once("://")?.1.split(['/', ':']).next())
        .filter(|host| !host.is_empty())
        .collect();
    for source in sources {
        for (index, line) in source.text.lines().enumerate() {
            if hosts.iter().any(|host| line.contains(host)) {
                let what = "this names a mirror of the machine's".to_owned();
                offences.push(Offence {
                    rule: "mirror",
                    path: source.path.clone(),
                    line: index + 1,
                    what,
                });
            }
        }
    }
    Ok(())
}

/// An exception allows one rule to be broken in one file.
fn exceptions() -> Result<Vec<(String, String)>> {
    let file = repository().join("xtask/tidy-exceptions");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let (place, argument) = line.split_once(": ").unwrap_or((line, ""));
            let (rule, path) = place.split_once(' ').with_context(|| format!("`{line}`"))?;
            ensure!(!argument.trim().is_empty(), "an exception without an argument: `{line}`");
            Ok((rule.to_owned(), path.to_owned()))
        })
        .collect()
}

fn report(offences: Vec<Offence>) -> Result<()> {
    let exceptions = exceptions()?;
    let mut complaints = Vec::new();
    for (rule, path) in &exceptions {
        if !offences.iter().any(|offence| offence.rule == rule && offence.path == *path) {
            complaints.push(format!("xtask/tidy-exceptions: nothing needs `{rule} {path}`"));
        }
    }
    for Offence { rule, path, line, what } in offences {
        if !exceptions.iter().any(|(excepted, file)| excepted == rule && *file == path) {
            complaints.push(format!("{path}:{line}: {rule}: {what}"));
        }
    }
    if complaints.is_empty() {
        return Ok(());
    }
    bail!("{} offences\n{}", complaints.len(), complaints.join("\n"))
}

#[cfg(test)]
mod test {
    use super::*;

    #[track_caller]
    fn check(path: &str, line: &str, expected: &[&str]) {
        let found: Vec<_> = offences_in_line(path, line).into_iter().map(|found| found.0).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn comments_and_other_words_break_no_rule() {
        check("agent/daemon/src/main.rs", "// unsafe { is not meant", &[]);
        check("agent/daemon/src/main.rs", "cache=unsafe", &[]);
        check("agent/daemon/src/kernel/exec.rs", "Command::new(program)", &[]);
        check("agent/daemon/src/rpc/convert.rs", "impl From<v1::Volume> for Spec {", &[]);
    }

    #[test]
    fn each_rule_finds_what_it_is_for() {
        check("agent/model/src/plan.rs", "    unsafe { read() }", &["unsafe"]);
        check("agent/daemon/src/main.rs", "std::process::Command::new(\"lvs\")", &["command"]);
        check("agent/daemon/src/service.rs", "impl From<v1::Volume> for A {", &["conversion"]);
        check("agent/cli/src/main.rs", "todo!()", &["unfinished"]);
    }
}
