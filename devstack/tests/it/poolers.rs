//! LOMS behind PgBouncer as Debian has it, in both modes: calls work, waits have their bounds, and nothing is left on the
//! servers' sessions for whoever gets them next.

use std::{
    collections::BTreeSet,
    fs::Permissions,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    process::Stdio,
    time::{Duration, Instant},
};

use devstack::stack::{Options, Stack};
use futures::future::join_all;
use proto::loms::{
    CancelOrderRequest, CreateOrderRequest, ListOrderRequest, OrderItem, OrderPayedRequest,
    StocksRequest, loms_client::LomsClient,
};
use serde_json::json;
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
use tokio::process::{Child, Command};
use tonic::{Code, transport::Channel};

use crate::{
    replica::Replica,
    test_stack::{binaries, eventually},
};

/// Server connections that PgBouncer may open: fewer than LOMS asks for, so that they change hands.
const SERVERS: usize = 4;

struct PgBouncer {
    _child: Child,
    _dir: tempfile::TempDir,
    /// Of a client that goes through it.
    url: String,
}

impl PgBouncer {
    /// In front of the database of `url`, `postgres://user:password@host:port/database`.
    async fn start(mode: &str, servers: usize, url: &str) -> PgBouncer {
        let (_, rest) = url.split_once("://").unwrap();
        let (user, rest) = rest.split_once(':').unwrap();
        let (password, rest) = rest.split_once('@').unwrap();
        let (address, database) = rest.split_once('/').unwrap();
        let (host, server) = address.split_once(':').unwrap();
        let dir = tempfile::tempdir().unwrap();
        // it refuses to be root, and takes another uid
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let ini = format!(
            "[databases]\n{database} = host={host} port={server} user={user} password={password}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
             pool_mode = {mode}\ndefault_pool_size = {servers}\nquery_wait_timeout = 10\n"
        );
        let file = dir.path().join("pgbouncer.ini");
        std::fs::write(&file, ini).unwrap();
        let mut command = Command::new("pgbouncer");
        if nix::unistd::Uid::effective().is_root() {
            command.args(["-u", "nobody"]);
        }
        let child = command
            .arg(&file)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("pgbouncer, which .ci/deployments installs");
        let url = format!("postgres://{user}:{password}@127.0.0.1:{port}/{database}");
        // a pooler refuses start-up parameters that it does not know
        let options: PgConnectOptions = url.parse().unwrap();
        let options = options.extra_float_digits(None);
        eventually("PgBouncer", async || {
            PgConnection::connect_with(&options).await.is_ok()
        })
        .await;
        PgBouncer {
            _child: child,
            _dir: dir,
            url,
        }
    }

    /// What each server session has set, `name=value`: one transaction on each at once.
    async fn settings(&self, servers: usize) -> BTreeSet<String> {
        let sessions = join_all((0..servers).map(async |_| {
            // a pooler refuses start-up parameters that it does not know
            let options: PgConnectOptions = self.url.parse().unwrap();
            let options = options.extra_float_digits(None);
            let mut client = PgConnection::connect_with(&options).await.unwrap();
            sqlx::raw_sql("BEGIN").execute(&mut client).await.unwrap();
            client
        }))
        .await;
        let mut found = BTreeSet::new();
        for mut client in sessions {
            let set = "SELECT name || '=' || setting FROM pg_settings
                       WHERE name LIKE '%timeout' OR name LIKE 'enable%' OR name LIKE 'tcp_keep%' OR name = 'search_path'
                       UNION ALL SELECT 'prepared statements=' || count(*) FROM pg_prepared_statements";
            let rows = sqlx::raw_sql(set).fetch_all(&mut client).await.unwrap();
            found.extend(rows.iter().map(|row| sqlx::Row::get::<String, _>(row, 0)));
            sqlx::raw_sql("ROLLBACK")
                .execute(&mut client)
                .await
                .unwrap();
            client.close().await.unwrap();
        }
        found
    }
}

fn order(user: i64, key: &str) -> CreateOrderRequest {
    CreateOrderRequest {
        user,
        items: vec![OrderItem { sku: 7, count: 1 }],
        idempotency_key: key.to_owned(),
    }
}

/// Orders, payments, cancellations and questions, `calls` of them by 16 callers.
async fn mixed(loms: &LomsClient<Channel>, calls: usize) {
    let callers = join_all((0..16_usize).map(async |caller| {
        let mut loms = loms.clone();
        for n in 0..calls / 16 / 4 {
            let key = format!("{caller}-{n}");
            let made = loms.create_order(order(1 + caller as i64, &key)).await;
            let order_id = made.unwrap().into_inner().order_id;
            loms.stocks(StocksRequest { sku: 7 }).await.unwrap();
            loms.list_order(ListOrderRequest { order_id })
                .await
                .unwrap();
            if n % 2 == 0 {
                loms.order_payed(OrderPayedRequest { order_id })
                    .await
                    .unwrap();
            } else {
                loms.cancel_order(CancelOrderRequest { order_id })
                    .await
                    .unwrap();
            }
        }
    }));
    callers.await;
}

async fn behind(mode: &str, servers: usize, settings: serde_json::Value) {
    let options = Options {
        services: &["loms"],
        quiet: true,
        ..Options::new(binaries().await)
    };
    let stack = Stack::start(&options).await.unwrap();
    let file = stack.dir().join("stock.csv");
    std::fs::write(&file, "warehouse_id,sku,count\n1,7,100000\n1,8,100\n").unwrap();
    stack.receive_stock(&file).await.unwrap();
    let direct = stack.database("loms").unwrap().to_owned();
    let pgbouncer = PgBouncer::start(mode, servers, &direct).await;
    let before = pgbouncer.settings(SERVERS).await;
    let mut settings = settings;
    settings["connection_string"] = json!(pgbouncer.url);
    settings["lock_timeout"] = json!("500ms");
    let replica = Replica::start(&stack, &json!({"postgres": settings})).await;
    let loms = replica.stranger();
    mixed(&loms, 1_024).await;

    // time-outs are in force behind it
    let mut admin = PgConnection::connect(&direct).await.unwrap();
    let mut locked = admin.begin().await.unwrap();
    sqlx::query("SELECT FROM loms.stock WHERE sku = 7 FOR UPDATE")
        .execute(&mut *locked)
        .await
        .unwrap();
    let began = Instant::now();
    let refused = loms
        .clone()
        .create_order(order(99, "held"))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(refused.message().contains("locked"), "{refused:?}");
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    locked.rollback().await.unwrap();

    let piled = "SELECT count(*) FROM pg_prepared_statements";
    let piled: i64 = sqlx::query_scalar(piled)
        .fetch_one(&mut admin)
        .await
        .unwrap();
    assert!(piled < 10, "{piled}");
    replica.stop().await;
    assert_eq!(pgbouncer.settings(SERVERS).await, before);
    drop(pgbouncer);
    let audit = stack.command("loms", &["audit"]).await.unwrap();
    assert!(audit.status.success(), "{}\n{}", audit.stdout, audit.stderr);
    stack.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_transaction_pooler() {
    behind("transaction", SERVERS, json!({"pooler": "transaction"})).await;
}

/// A session is a client's for as long as it is connected, so that there must be as many as LOMS has connections.
#[tokio::test(flavor = "multi_thread")]
async fn behind_a_session_pooler() {
    behind("session", 40, json!({})).await;
}
