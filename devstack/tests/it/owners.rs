//! Services reach their databases as they do in production: as the owner of one database, who may do nothing else.

use std::{collections::BTreeSet, path::Path, process::Stdio, time::Duration};

use devstack::postgres::{Server, Source};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::Command,
    time::timeout,
};

use crate::test_stack::{DEVSTACK, TestStack};

/// The users of the services, and the databases that no fresh server has.
async fn users_and_databases(admin: &mut PgConnection) -> Vec<String> {
    let there = "SELECT rolname::text FROM pg_roles WHERE rolname IN ('checkout', 'loms', 'notifications')
                 UNION ALL SELECT datname::text FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1')";
    sqlx::query_scalar(there).fetch_all(admin).await.unwrap()
}

/// What tests make on a server that somebody lends goes when they have ended, and so do the users.
#[tokio::test]
async fn a_run_of_tests_leaves_nothing_on_the_server_of_another() {
    let server = Server::start(Path::new(DEVSTACK), Source::Own)
        .await
        .unwrap();
    let mut admin = PgConnection::connect(server.admin_url()).await.unwrap();
    let mut tests = Command::new(DEVSTACK)
        .args(["pg", "--", "bash", "-c", "echo \"$TESTKIT_RUN\"; read -r _"])
        .env("DATABASE_URL", server.admin_url())
        .env_remove("TESTKIT_RUN")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut run = BufReader::new(tests.stdout.take().unwrap()).lines();
    let run = run.next_line().await.unwrap().unwrap();
    for name in ["test_another_loms_0", &format!("test_{run}_loms_0")] {
        testkit::owner::create_database(&mut admin, server.admin_url(), name, "loms", None)
            .await
            .unwrap();
    }
    let theirs = format!("test_{run}_loms_0");
    let there = users_and_databases(&mut admin).await;
    assert_eq!(there, ["loms", "test_another_loms_0", &theirs]);

    let mut end = tests.stdin.take().unwrap();
    end.write_all(b"\n").await.unwrap();
    let ended = timeout(Duration::from_secs(60), tests.wait()).await;
    assert!(ended.expect("it ends").unwrap().success());
    // the user stays who owns what another run has made
    let there = users_and_databases(&mut admin).await;
    assert_eq!(there, ["loms", "test_another_loms_0"]);

    testkit::owner::drop_database(&mut admin, "test_another_loms_0")
        .await
        .unwrap();
    let again = Command::new(DEVSTACK)
        .args(["pg", "--", "true"])
        .env("DATABASE_URL", server.admin_url())
        .env_remove("TESTKIT_RUN")
        .status()
        .await
        .unwrap();
    assert!(again.success());
    // who was there before this run was not of its making
    assert_eq!(users_and_databases(&mut admin).await, ["loms"]);
    admin.close().await.unwrap();
    server.stop().await.unwrap();
}

#[tokio::test]
async fn each_service_is_the_owner_of_its_database_and_no_superuser() {
    let mut stack = TestStack::start(&[(1, 7, 1)]).await;
    let admin = stack.stack().admin_database("loms").unwrap();
    let mut admin = PgConnection::connect(&admin).await.unwrap();
    let mut databases: Vec<String> = Vec::new();
    for service in ["checkout", "loms", "notifications"] {
        let mut owner = PgConnection::connect(stack.stack().database(service).unwrap())
            .await
            .unwrap();
        let name = sqlx::query_scalar("SELECT current_database()::text");
        databases.push(name.fetch_one(&mut owner).await.unwrap());
    }
    // those of the services say what they are
    let sessions = "SELECT DISTINCT split_part(a.application_name, '-', 1), a.usename::text, pg_get_userbyid(d.datdba)::text,
                           r.rolsuper OR r.rolcreatedb OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls
                    FROM pg_stat_activity a JOIN pg_database d ON d.oid = a.datid JOIN pg_roles r ON r.oid = a.usesysid
                    WHERE d.datname = ANY($1) AND a.application_name ~ '^(checkout|loms|notifications)'";
    let sessions: Vec<(String, String, String, bool)> = sqlx::query_as(sessions)
        .bind(&databases)
        .fetch_all(&mut admin)
        .await
        .unwrap();
    let expected = ["checkout", "loms", "notifications"]
        .map(|name| (name.to_owned(), name.to_owned(), name.to_owned(), false));
    assert_eq!(BTreeSet::from_iter(sessions), BTreeSet::from_iter(expected));
    stack.finish().await;
}
