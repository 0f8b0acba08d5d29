//! Databases as tests get them, and what is left of them.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{collections::BTreeSet, time::Duration};

use sqlx::{
    PgPool,
    migrate::{Migration, MigrationType, Migrator},
};

const OWNERS: [&str; 3] = ["checkout", "loms", "notifications"];

/// What its tests would be given, if there were a service of one table.
fn migrator(table: &str) -> &'static Migrator {
    let create = format!("CREATE SCHEMA loms; CREATE TABLE loms.{table} (id BIGINT)");
    let create = sqlx::SqlSafeStr::into_sql_str(sqlx::AssertSqlSafe(create));
    let first = Migration::new(1, "create".into(), MigrationType::Simple, create, false);
    Box::leak(Box::new(Migrator::with_migrations(vec![first])))
}

async fn said(pool: &PgPool, query: &'static str) -> Vec<String> {
    sqlx::query_scalar(query).fetch_all(pool).await.unwrap()
}

#[tokio::test]
async fn a_test_is_the_owner_of_its_database_and_nothing_more() {
    for owner in OWNERS {
        let pool = testkit::empty_database(owner).await;
        let me = said(
            &pool,
            "SELECT concat_ws(' ', rolname, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls)
             FROM pg_roles WHERE rolname = session_user AND rolname = current_user",
        );
        assert_eq!(me.await, [format!("{owner} f f f f f")]);
        let of = said(
            &pool,
            "SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = current_database()",
        );
        assert_eq!(of.await, [owner]);
        // as shipped: nobody sets it for the service
        let path = said(&pool, "SELECT current_setting('search_path')").await;
        assert_eq!(path, [r#""$user", public"#]);
        let set = "SELECT s::text FROM pg_db_role_setting s
                   JOIN pg_database d ON d.oid = s.setdatabase WHERE d.datname = current_database()";
        assert!(said(&pool, set).await.is_empty());
    }
}

#[tokio::test]
async fn the_administrator_sees_the_same_database() {
    let pool = testkit::empty_database("loms").await;
    let admin = testkit::admin(&pool).await;
    let database = "SELECT current_database()::text";
    assert_eq!(said(&pool, database).await, said(&admin, database).await);
    let superuser = "SELECT rolsuper::text FROM pg_roles WHERE rolname = session_user";
    assert_eq!(said(&admin, superuser).await, ["true"]);
}

/// As tests do: each on a thread and a runtime of its own.
#[test]
fn many_at_once_are_one_migration_and_a_database_each() {
    let migrator = migrator("parcel");
    let test = move |n: i64| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let pool = testkit::database("loms", migrator).await;
            let insert = sqlx::query("INSERT INTO loms.parcel VALUES ($1)").bind(n);
            insert.execute(&pool).await.unwrap();
            let rows = said(&pool, "SELECT count(*)::text FROM loms.parcel").await;
            assert_eq!(rows, ["1"]);
            let name = said(&pool, "SELECT current_database()::text").await;
            let applied = said(&pool, "SELECT installed_on::text FROM _sqlx_migrations").await;
            (name, applied)
        })
    };
    let tests: Vec<_> = (0..12)
        .map(|n| std::thread::spawn(move || test(n)))
        .collect();
    let made = tests.into_iter().map(|test| test.join().unwrap());
    let (names, applied): (BTreeSet<_>, BTreeSet<_>) = made.unzip();
    assert_eq!((names.len(), applied.len()), (12, 1));
}

#[tokio::test]
async fn other_migrations_are_another_template() {
    let one = testkit::database("loms", migrator("crate")).await;
    let other = testkit::database("loms", migrator("pallet")).await;
    let table = "SELECT relname::text FROM pg_class WHERE relnamespace = 'loms'::regnamespace";
    assert_eq!(said(&one, table).await, ["crate"]);
    assert_eq!(said(&other, table).await, ["pallet"]);
}

#[tokio::test]
async fn a_database_goes_with_the_last_of_its_pool_unless_the_test_failed() {
    let watch = testkit::empty_database("loms").await;
    let admin = testkit::admin(&watch).await;
    let databases = async || said(&admin, "SELECT datname::text FROM pg_database").await;

    let pool = testkit::empty_database("loms").await;
    let name = said(&pool, "SELECT current_database()::text")
        .await
        .remove(0);
    let clone = pool.clone();
    drop(pool);
    assert!(databases().await.contains(&name));
    drop(clone);
    let gone = async {
        while databases().await.contains(&name) {
            tokio::task::yield_now().await;
        }
    };
    let bound = Duration::from_secs(120);
    tokio::time::timeout(bound, gone)
        .await
        .expect("it is dropped");

    let failed = std::thread::spawn(|| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let test = std::panic::AssertUnwindSafe(|| {
            runtime.block_on(async {
                let pool = testkit::empty_database("loms").await;
                let name = said(&pool, "SELECT current_database()::text").await;
                tell.send(name).unwrap();
                panic!("as a test that fails");
            })
        });
        std::panic::catch_unwind(test).unwrap_err();
        told.recv().unwrap().remove(0)
    });
    let failed = failed.join().unwrap();
    assert!(databases().await.contains(&failed));
    let mut admin = admin.acquire().await.unwrap();
    testkit::owner::drop_database(&mut admin, &failed)
        .await
        .unwrap();
}
