//! What the Makefile's targets for docker compose ask of docker, with one that only notes what it is asked.

use std::{env, ffi::OsString, fs, os::unix::fs::PermissionsExt as _, path::Path, process::Output};

use tokio::process::Command;

use crate::deployments::{Compose, root};

/// Has one container, which ends with the exit code `INPUTS`, and the volumes `KEPT`.
const DOCKER: &str = r#"#!/bin/sh
echo "docker $*" >>"${0%/*}/asked"
case " $* " in
*" ps "*) echo c0ffee ;;
" wait c0ffee ") echo "$INPUTS" ;;
" volume ls "*) printf "$KEPT" ;;
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

/// What `make ARGUMENTS` in `dir` says, and what it has asked for, in an environment with `variable` only.
async fn run(dir: &Path, arguments: &[&str], variable: (&str, &str)) -> (Output, Vec<String>) {
    let bin = tempfile::tempdir().unwrap();
    program(bin.path(), "docker", DOCKER);
    program(bin.path(), "chmod", CHMOD);
    let mut path = OsString::from(bin.path());
    path.push(":");
    path.push(env::var_os("PATH").unwrap());
    // of the make that runs this test it must know nothing
    let output = Command::new("make")
        .args(arguments)
        .current_dir(dir)
        .env_clear()
        .env("PATH", path)
        .env(variable.0, variable.1)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let asked = fs::read_to_string(bin.path().join("asked"));
    let asked = asked.unwrap_or_else(|error| panic!("nothing was asked, {error}: {said}"));
    (output, asked.lines().map(str::to_owned).collect())
}

/// Whether `make TARGET` is content, and what it has asked for; the file of passwords is not written.
async fn make(target: &str, inputs: &str) -> (bool, Vec<String>) {
    let arguments = ["-o", "deployments/.env", target];
    let (output, asked) = run(&root(), &arguments, ("INPUTS", inputs)).await;
    (output.status.success(), asked)
}

#[tokio::test]
async fn passwords_are_not_made_anew_beside_volumes_that_know_the_old_ones() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("deployments")).unwrap();
    for file in ["Makefile", "deployments/new-env", "deployments/example.env"] {
        fs::copy(root().join(file), dir.path().join(file)).unwrap();
    }
    let env = dir.path().join("deployments/.env");
    for target in ["run-services", "run-log-env"] {
        let kept = ("KEPT", r"marketplace_loms-db\nmarketplace_kafka-1\n");
        let (output, asked) = run(dir.path(), &[target], kept).await;
        assert!(!output.status.success() && !env.exists(), "{asked:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        let said: Vec<_> = said
            .lines()
            .filter(|line| !line.starts_with("make"))
            .collect();
        assert!(
            matches!(said.as_slice(), [line] if line.contains(".env is lost") && line.contains("put it back")),
            "{said:?}"
        );
        // nothing but the question
        let question =
            "docker volume ls --quiet --filter label=com.docker.compose.project=marketplace";
        assert_eq!(asked, [question]);
    }
    let (output, _) = run(dir.path(), &["run-services"], ("KEPT", "")).await;
    assert!(output.status.success() && env.exists());
    // it is there: whatever volumes there are were made with it
    let first = fs::read(&env).unwrap();
    let (output, _) = run(
        dir.path(),
        &["run-services"],
        ("KEPT", "marketplace_loms-db"),
    )
    .await;
    assert!(output.status.success() && fs::read(&env).unwrap() == first);
}

#[tokio::test]
async fn what_runs_can_be_stopped_without_its_passwords() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(root().join("Makefile"), dir.path().join("Makefile")).unwrap();
    let (output, asked) = run(dir.path(), &["stop"], ("KEPT", "marketplace_loms-db")).await;
    assert!(output.status.success());
    assert_eq!(asked, ["docker compose -p marketplace down"]);
    assert!(
        Compose::all()
            .iter()
            .all(|file| file.document["name"] == "marketplace")
    );
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
