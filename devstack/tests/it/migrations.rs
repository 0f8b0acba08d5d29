//! `make migration` starts the next migration of a service, or says what is wrong with its name; CI says what is wrong with
//! what it does.

use std::{fs, path::Path};

use tokio::process::Command;

use crate::deployments::root;

/// Exit code, stdout, stderr.
async fn migration(service: &str, name: &str, folder: &Path) -> (Option<i32>, String, String) {
    let output = Command::new(root().join(".ci/migration"))
        .args([service, name])
        .arg(folder)
        .current_dir(folder)
        .output()
        .await
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap().trim().to_owned();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[tokio::test]
async fn the_next_number_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let loms = dir.path().join("loms");
    fs::create_dir(&loms).unwrap();
    fs::create_dir(dir.path().join("checkout")).unwrap();
    for (name, expected) in [
        ("create_orders", "loms/0001_create_orders.sql"),
        ("add_order_index", "loms/0002_add_order_index.sql"),
    ] {
        let (code, said, error) = migration("loms", name, dir.path()).await;
        assert_eq!((code, said.as_str()), (Some(0), expected), "{error}");
        let text = fs::read_to_string(dir.path().join(expected)).unwrap();
        assert!(text.lines().all(|line| line.starts_with("-- ")), "{text}");
    }
    // eight and nine are no octal digits
    fs::write(loms.join("0008_drop_column.sql"), "").unwrap();
    let (_, said, _) = migration("loms", "add_column", dir.path()).await;
    assert_eq!(said, "loms/0009_add_column.sql");
    let (_, said, _) = migration("loms", "add_column_2", dir.path()).await;
    assert_eq!(said, "loms/0010_add_column_2.sql");
    let (_, said, _) = migration("checkout", "create_cart", dir.path()).await;
    assert_eq!(said, "checkout/0001_create_cart.sql");
}

#[tokio::test]
async fn what_is_wrong_is_said_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let loms = dir.path().join("loms");
    fs::create_dir(&loms).unwrap();
    for (service, name, expected) in [
        ("", "", "make migration service="),
        ("loms", "", "make migration service="),
        ("shop", "add_column", "no service shop: loms"),
        ("loms", "index", "a verb and a noun"),
        ("loms", "Add_Column", "a verb and a noun"),
        ("loms", "../add_column", "a verb and a noun"),
    ] {
        let (code, _, said) = migration(service, name, dir.path()).await;
        assert_eq!(code, Some(64), "{said}");
        assert!(said.contains(expected), "{said}");
    }
    assert_eq!(fs::read_dir(loms).unwrap().count(), 0);
}

/// Files beyond the released ones, each in a folder of its own with those before it, and what is said of the last.
#[tokio::test]
async fn a_migration_that_would_keep_calls_waiting_is_refused() {
    const DROP: &str = "-- no-transaction\nDROP INDEX CONCURRENTLY IF EXISTS loms.stock_idx;\n";
    const CREATE: &str =
        "-- no-transaction\n-- why\nCREATE INDEX CONCURRENTLY stock_idx ON loms.stock (count);\n";
    let validate = "-- no-transaction\nALTER TABLE loms.stock VALIDATE CONSTRAINT stock_fits;\n";
    for (files, expected) in [
        (vec![DROP, CREATE], None),
        (vec![validate], None),
        (
            vec!["ALTER TABLE loms.stock ADD COLUMN place TEXT;\n"],
            None,
        ),
        (vec![CREATE], Some("the file before it is")),
        (
            vec![
                DROP,
                "CREATE INDEX CONCURRENTLY stock_idx ON loms.stock (count);\n",
            ],
            Some("begins `-- no-transaction`"),
        ),
        (
            vec!["ALTER TABLE loms.stock VALIDATE CONSTRAINT stock_fits;\n"],
            Some("begins `-- no-transaction`"),
        ),
        (
            vec!["-- no-transaction\nSELECT 1; SELECT 2;\n"],
            Some("one statement"),
        ),
        (
            vec![
                DROP,
                "-- no-transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS stock_idx ON loms.stock (count);\n",
            ],
            Some("no IF NOT EXISTS"),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for service in ["checkout", "loms", "notifications"] {
            fs::create_dir(dir.path().join(service)).unwrap();
        }
        for (file, version) in files.iter().zip(10..) {
            let name = format!("loms/00{version}_do_this.sql");
            fs::write(dir.path().join(name), file).unwrap();
        }
        let mut command = Command::new(root().join(".ci/online"));
        let ended = command.arg("rules").arg(dir.path()).output().await.unwrap();
        let said = String::from_utf8(ended.stdout).unwrap();
        match expected {
            None => assert!(ended.status.success(), "{files:?}: {said}"),
            Some(expected) => {
                assert_eq!(ended.status.code(), Some(1), "{files:?}");
                assert!(said.contains(expected), "{said}");
            }
        }
    }
}
