//! What the Makefile's targets for docker compose ask of docker, with one that only notes what it is asked.

use std::{env, ffi::OsString, fs, os::unix::fs::PermissionsExt as _, path::Path};

use tokio::process::Command;

use crate::deployments::{Compose, root};

/// Has one container, which ends with the exit code `INPUTS`.
const DOCKER: &str = r#"#!/bin/sh
echo "docker $*" >>"${0%/*}/asked"
case " $* " in
*" ps "*) echo c0ffee ;;
" wait c0ffee ") echo "$INPUTS" ;;
esac
"#;

/// The repository's modes are not a test's to change.
const CHMOD: &str = r#"#!/bin/sh
echo "chmod $*" >>"${0%/*}/asked"
"#;

fn program(bin: &Path, name: &str, text: &str) {
    let file = bin.join(name);
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Whether `make TARGET` is content, and what it has asked for.
async fn make(target: &str, inputs: &str) -> (bool, Vec<String>) {
    let bin = tempfile::tempdir().unwrap();
    program(bin.path(), "docker", DOCKER);
    program(bin.path(), "chmod", CHMOD);
    let mut path = OsString::from(bin.path());
    path.push(":");
    path.push(env::var_os("PATH").unwrap());
    // of the make that runs this test it must know nothing; the file of passwords is not written
    let output = Command::new("make")
        .args(["-o", "deployments/.env", target])
        .current_dir(root())
        .env_clear()
        .env("PATH", path)
        .env("INPUTS", inputs)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let asked = fs::read_to_string(bin.path().join("asked"));
    let asked = asked.unwrap_or_else(|error| panic!("nothing was asked, {error}: {said}"));
    let asked = asked.lines().map(str::to_owned).collect();
    (output.status.success(), asked)
}

#[tokio::test]
async fn inputs_that_could_not_be_made_fail_the_target() {
    let (content, asked) = make("run-log-env", "0").await;
    assert!(content, "{asked:?}");
    assert!(asked[1].ends_with(" up --detach"), "{asked:?}");
    assert_eq!(asked.last().unwrap(), "docker wait c0ffee");

    let (content, asked) = make("run-log-env", "1").await;
    assert!(!content, "{asked:?}");
    let shown = asked.last().unwrap();
    assert!(shown.ends_with(" logs --tail 5 graylog-inputs"), "{shown}");
}

#[tokio::test]
async fn what_is_mounted_is_made_readable_first() {
    for (target, compose) in ["run-services", "run-log-env"]
        .into_iter()
        .zip(Compose::all())
    {
        let (content, asked) = make(target, "0").await;
        assert!(content, "{asked:?}");
        let mut readable = asked[0].split(' ');
        assert!(readable.by_ref().take(3).eq(["chmod", "-R", "a+rX"]));
        let readable: Vec<_> = readable
            .map(|path| root().join(path).canonicalize().unwrap())
            .collect();
        for service in compose.services() {
            let sources = service.volumes().into_iter().map(|(source, ..)| source);
            for source in sources.filter(|source| source.starts_with('.')) {
                let file = root().join("deployments").join(source);
                let file = file.canonicalize().unwrap();
                let found = readable.iter().any(|path| file.starts_with(path));
                assert!(found, "{source}");
            }
        }
    }
}
