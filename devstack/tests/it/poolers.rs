//! The services behind PgBouncer as Debian has it, in both modes: calls and workers work, waits
//! have their bounds, and nothing is left on the servers' sessions for the clients that get them
//! next.

use std::{
    collections::BTreeSet,
    fs::Permissions,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    process::Stdio,
    time::{Duration, Instant},
};

use devstack::{
    binaries::SERVICES,
    clients::{Clients, period_around_now},
    service::merge,
    stack::{Options, Stack},
};
use futures::future::join_all;
use proto::{
    loms::{
        CancelOrderRequest, CreateOrderRequest, ListOrderRequest, OrderItem, OrderPayedRequest,
        StocksRequest, loms_client::LomsClient,
    },
    notifications::GetHistoryWithPeriodRequest,
};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection, PgPool, postgres::PgConnectOptions};
use tokio::process::{Child, Command};
use tonic::{Code, transport::Channel};

use crate::{
    caller::Caller,
    test_stack::{binaries, eventually},
};

const SKU: u32 = 85_123_001;
/// Server connections that PgBouncer may open: fewer than a service asks for, so that they change
/// hands.
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
            // PgBouncer itself passes on what a client calls itself
            let set = "SELECT name || '=' || coalesce(setting, '') FROM pg_settings WHERE name <> 'application_name'
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
        items: vec![OrderItem { sku: SKU, count: 1 }],
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
            loms.stocks(StocksRequest { sku: SKU }).await.unwrap();
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

/// Carts that are filled and bought, and looks at histories.
async fn bought(clients: &Clients, carts: i64) {
    let buyers = join_all((1..=carts).map(async |user| {
        let caller = Caller(clients.clone());
        caller.add(user, SKU, 1).await.unwrap();
        let order_id = caller.purchase(user, "once").await.unwrap();
        assert_eq!(caller.purchase(user, "once").await.unwrap(), order_id);
        let (from, to) = period_around_now();
        let request = GetHistoryWithPeriodRequest {
            user,
            from: Some(from),
            to: Some(to),
            ..Default::default()
        };
        let mut notifications = clients.notifications.clone();
        let asked = notifications.get_history_with_period(request).await;
        asked.unwrap();
    }));
    buyers.await;
}

/// A stack whose services reach their databases through poolers.
async fn pooled(mode: &str, servers: usize, settings: &Value) -> (Stack, Vec<PgBouncer>) {
    let options = Options {
        quiet: true,
        ..Options::new(binaries().await)
    };
    let mut stack = Stack::start(&options).await.unwrap();
    let file = stack.dir().join("stock.csv");
    let stock = format!("warehouse_id,sku,count\n1,{SKU},100000\n");
    std::fs::write(&file, stock).unwrap();
    stack.receive_stock(&file).await.unwrap();
    let mut poolers = Vec::new();
    for (index, name) in SERVICES.into_iter().enumerate() {
        let direct = stack.database(name).unwrap().to_owned();
        let pooler = PgBouncer::start(mode, servers, &direct).await;
        let service = &mut stack.parts().0[index];
        service.stop().await.unwrap();
        let config = std::fs::read_to_string(service.config()).unwrap();
        let mut config: Value = serde_yaml::from_str(&config).unwrap();
        merge(&mut config["postgres"], settings);
        config["postgres"]["connection_string"] = json!(pooler.url);
        std::fs::write(service.config(), config.to_string()).unwrap();
        poolers.push(pooler);
    }
    (stack, poolers)
}

async fn behind(mode: &str, servers: usize, mut settings: Value) {
    settings["lock_timeout"] = json!("500ms");
    let (mut stack, poolers) = pooled(mode, servers, &settings).await;
    let before = join_all(poolers.iter().map(|pooler| pooler.settings(servers))).await;
    let (services, ..) = stack.parts();
    for service in services {
        service.start_again().await.unwrap();
    }
    stack.wait_ready().await.unwrap();
    let clients = stack.clients().unwrap();
    let loms = clients.loms.clone();
    mixed(&loms, 1_024).await;
    bought(&clients, 64).await;

    // time-outs are in force behind it
    let direct = stack.database("loms").unwrap().to_owned();
    let mut owner = PgConnection::connect(&direct).await.unwrap();
    let mut locked = owner.begin().await.unwrap();
    sqlx::query("SELECT FROM loms.stock FOR UPDATE")
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

    let changes: i64 = sqlx::query_scalar("SELECT count(*) FROM loms.status_change")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    let notifications = stack.database("notifications").unwrap();
    let notifications = PgPool::connect(notifications).await.unwrap();
    eventually("every change is told", async || {
        let told = "SELECT count(*) FROM notifications.message WHERE told_at IS NOT NULL";
        let told: i64 = sqlx::query_scalar(told)
            .fetch_one(&notifications)
            .await
            .unwrap();
        told == changes
    })
    .await;
    // what a pooler does to statements shows here first
    for name in SERVICES {
        let log = std::fs::read_to_string(stack.service(name).unwrap().log()).unwrap();
        assert!(!log.contains("prepared statement"), "{log}");
    }
    // it goes the same way
    let audit = stack.command("loms", &["audit"]).await.unwrap();
    assert!(audit.status.success(), "{}\n{}", audit.stdout, audit.stderr);
    for service in stack.parts().0 {
        service.stop().await.unwrap();
    }
    let after = join_all(poolers.iter().map(|pooler| pooler.settings(servers))).await;
    assert_eq!(after, before);
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
