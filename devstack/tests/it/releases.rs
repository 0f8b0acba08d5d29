//! Two releases side by side: the one before (`PREVIOUS_RELEASE`, which .ci/previous builds) on
//! this one's schema, and each service of one beside the others of the other, on the way here and
//! on the way back.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use devstack::{
    binaries::{Binaries, SERVICES},
    clients::Clients,
    service,
    stack::{Options, Stack},
};
use proto::loms::ListOrderRequest;
use serde_json::json;
use sqlx::PgPool;
use tonic::Code;

use crate::{
    caller::Caller,
    replica::Replica,
    test_stack::{binaries, eventually},
};

const HEART: u32 = 85_123_001;
/// Of each delivery. A cart may hold as many.
const DELIVERED: u32 = 1_000;
const READY_BOUND: Duration = Duration::from_secs(30);

/// The executables of the release before.
async fn previous() -> Binaries {
    let folder = std::env::var_os("PREVIOUS_RELEASE").expect("PREVIOUS_RELEASE=$(.ci/previous)");
    binaries().await.with_services(PathBuf::from(folder))
}

/// An order, and what it must have become before the next trade ends.
struct Left {
    user: i64,
    key: String,
    order: i64,
}

/// A stack whose services are replaced while it sells.
struct Shop {
    stack: Stack,
    old: Binaries,
    new: Binaries,
    trades: u32,
    /// Placed by the trade before and still to be paid.
    left: Option<Left>,
    /// Users whose purchase found LOMS stopped.
    interrupted: Vec<i64>,
}

impl Shop {
    /// Everything as the release before has it: executables and schema.
    async fn open() -> Shop {
        let (old, new) = (previous().await, binaries().await);
        let loms = [&old, &new].map(|release| release.service("loms").unwrap());
        let [one, other] = loms.map(|executable| std::fs::read(executable).unwrap());
        assert!(one != other, "the same release twice");
        let options = Options {
            quiet: true,
            settings: json!({
                // what is left open is finished within a step
                "checkout": {"purchases": {"resume_after": "1s", "most_backoff": "1s"}},
                // keys that the release before does not know
                "loms": {"roles": null},
            }),
            ..Options::new(old.clone())
        };
        let mut stack = Stack::start(&options).await.unwrap();
        // CancelOrder of the release before fails for an owner whose search_path has the service's
        // schema
        let admin = stack.admin_database("loms").unwrap();
        let admin = PgPool::connect(&admin).await.unwrap();
        // of this database alone: other tests have the same owner
        sqlx::query(
            "DO $$ BEGIN EXECUTE format('ALTER ROLE loms IN DATABASE %I SET search_path = %L', current_database(), ''); END $$",
        )
        .execute(&admin)
        .await
        .unwrap();
        let loms = &mut stack.parts().0[1];
        loms.kill().await.unwrap();
        loms.start_again().await.unwrap();
        stack.wait_ready().await.unwrap();
        Shop {
            stack,
            old,
            new,
            trades: 0,
            left: None,
            interrupted: Vec::new(),
        }
    }

    /// `migrate` of this release, under the services that run.
    async fn migrate(&self) {
        for service in SERVICES {
            let migrated = self.run(&self.new, service, &["migrate"]).await;
            assert!(migrated.status.success(), "{}", migrated.stderr);
        }
    }

    async fn run(
        &self,
        release: &Binaries,
        service: &str,
        arguments: &[&str],
    ) -> service::Finished {
        let config = self.stack.dir().join(format!("{service}.yaml"));
        let executable = release.service(service).unwrap();
        service::run(service, &executable, arguments, &config)
            .await
            .unwrap()
    }

    /// Replaces a service. One purchase finds LOMS stopped; the services that start next finish it.
    async fn replace(&mut self, name: &str, release: &Binaries) {
        let user = 1_000 + i64::from(self.trades);
        let caller = Caller(self.stack.clients().unwrap());
        caller.add(user, HEART, 2).await.unwrap();
        let (services, ..) = self.stack.parts();
        let at = SERVICES
            .iter()
            .position(|service| *service == name)
            .unwrap();
        services[1].stop().await.unwrap();
        let refused = caller.purchase(user, "").await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        let executable = release.service(name).unwrap();
        services[at].replace(&executable).await.unwrap();
        if name != "loms" {
            services[1].start_again().await.unwrap();
        }
        for service in services {
            service.wait_ready(READY_BOUND).await.unwrap();
        }
        self.interrupted.push(user);
    }

    /// Buy, pay, cancel, expire, a shortage, a delivery, what was begun before; then both audits
    /// and the history.
    async fn trade(&mut self, step: &str) {
        eprintln!("{step}");
        self.trades += 1;
        let user = i64::from(self.trades);
        let caller = Caller(self.stack.clients().unwrap());
        self.receive().await;
        self.finish_what_was_begun(&caller).await;

        let payed = self.buy(&caller, user, "payed").await;
        // the second time nothing happens
        for _ in 0..2 {
            caller.pay(payed).await.unwrap();
        }
        let cancelled = self.buy(&caller, user, "cancelled").await;
        for _ in 0..2 {
            caller.cancel(cancelled).await.unwrap();
        }
        let refused = caller.pay(cancelled).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
        let expired = self.buy(&caller, user, "expired").await;
        self.pass_deadline(expired).await;
        let more = DELIVERED * (self.trades + 1);
        let short = caller.create(user, &[(HEART, more)], "").await.unwrap();
        let short = short.into_inner();
        let clients = &caller.0;
        eventually("it expires", async || {
            status(clients, expired).await == "cancelled"
        })
        .await;
        for (order, expected) in [
            (payed, "payed"),
            (cancelled, "cancelled"),
            (short.order_id, "failed"),
        ] {
            assert_eq!(status(clients, order).await, expected, "{step}");
        }
        let key = "left".to_owned();
        let order = self.buy(&caller, user, &key).await;
        self.left = Some(Left { user, key, order });
        self.recount(step).await;
    }

    async fn buy(&self, caller: &Caller, user: i64, key: &str) -> i64 {
        caller.add(user, HEART, 1).await.unwrap();
        let order = caller.purchase(user, key).await.unwrap();
        assert_eq!(status(&caller.0, order).await, "awaiting payment");
        order
    }

    /// The same key answers the same order and pays it; what LOMS was not there for has an order
    /// now, one.
    async fn finish_what_was_begun(&mut self, caller: &Caller) {
        if let Some(Left { user, key, order }) = self.left.take() {
            assert_eq!(caller.purchase(user, &key).await.unwrap(), order);
            caller.pay(order).await.unwrap();
            assert_eq!(status(&caller.0, order).await, "payed");
        }
        let checkout = self.database("checkout").await;
        eventually("nothing is open", async || {
            let open = "SELECT count(*) FROM checkout.purchase WHERE closed_at IS NULL";
            let open: i64 = sqlx::query_scalar(open).fetch_one(&checkout).await.unwrap();
            open == 0
        })
        .await;
        let loms = self.database("loms").await;
        for user in self.interrupted.drain(..) {
            let orders = "SELECT count(*) FROM loms.user_order WHERE user_id = $1";
            let orders: i64 = sqlx::query_scalar(orders)
                .bind(user)
                .fetch_one(&loms)
                .await
                .unwrap();
            assert_eq!(orders, 1);
        }
    }

    /// A delivery by the command of the release that serves.
    async fn receive(&mut self) {
        let file = self.stack.dir().join("delivery.csv");
        let mut csv = "warehouse_id,sku,count\n".to_owned();
        // each its own content: the same is the same delivery
        writeln!(csv, "{},{HEART},{DELIVERED}", self.trades + 1).unwrap();
        std::fs::write(&file, csv).unwrap();
        let file = file.to_str().unwrap().to_owned();
        for release in [&self.old, &self.new] {
            let received = self
                .run(release, "loms", &["stock", "receive", &file])
                .await;
            assert!(received.status.success(), "{}", received.stderr);
        }
    }

    /// The order's deadline is over.
    async fn pass_deadline(&self, order: i64) {
        sqlx::query("UPDATE loms.unpaid_order SET payment_deadline = now() WHERE order_id = $1")
            .bind(order)
            .execute(&self.database("loms").await)
            .await
            .unwrap();
    }

    /// Every change has been saved once and in order; both releases count the same.
    async fn recount(&self, step: &str) {
        let (loms, notifications) = (
            self.database("loms").await,
            self.database("notifications").await,
        );
        let changes =
            "SELECT order_id, sequence, to_status::text FROM loms.status_change ORDER BY 1, 2";
        let changes: Vec<(i64, i32, String)> =
            sqlx::query_as(changes).fetch_all(&loms).await.unwrap();
        let count = i64::try_from(changes.len()).unwrap();
        eventually("every change is saved", async || {
            let saved = "SELECT count(*) FROM notifications.message";
            let saved: i64 = sqlx::query_scalar(saved)
                .fetch_one(&notifications)
                .await
                .unwrap();
            saved >= count
        })
        .await;
        let saved =
            "SELECT order_id, sequence, status FROM notifications.message ORDER BY order_id, id";
        let saved: Vec<(i64, i32, String)> = sqlx::query_as(saved)
            .fetch_all(&notifications)
            .await
            .unwrap();
        assert_eq!(saved, changes, "{step}");
        for release in [&self.old, &self.new] {
            let audit = self.run(release, "loms", &["audit"]).await;
            assert!(audit.status.success(), "{step}: {}", audit.stdout);
        }
    }

    async fn database(&self, service: &str) -> PgPool {
        PgPool::connect(self.stack.database(service).unwrap())
            .await
            .unwrap()
    }
}

async fn status(clients: &Clients, order_id: i64) -> String {
    let mut loms = clients.loms.clone();
    let listed = loms.list_order(ListOrderRequest { order_id }).await;
    listed.unwrap().into_inner().status
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_of_an_upgrade_and_of_a_rollback_sells() {
    let mut shop = Shop::open().await;
    shop.trade("the release before").await;
    shop.migrate().await;
    shop.trade("the release before on the new schema").await;
    let (old, new) = (shop.old.clone(), shop.new.clone());
    for (service, release, step) in [
        ("loms", &new, "loms is new"),
        ("notifications", &new, "notifications is new"),
        ("checkout", &new, "all are new"),
        ("loms", &old, "loms is back"),
        ("checkout", &old, "checkout is back"),
        ("notifications", &old, "all are back"),
    ] {
        shop.replace(service, release).await;
        shop.trade(step).await;
    }
    shop.stack.stop().await.unwrap();
}

/// A rolling upgrade: replicas of both releases on one database, each with a relay. Each is killed
/// once, so that what it held of the outbox falls to the other.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_both_releases_share_an_outbox() {
    const ORDERS: i64 = 100;
    let mut shop = Shop::open().await;
    shop.receive().await;
    shop.migrate().await;
    let mut new = Replica::start(&shop.stack, &json!({})).await;
    for (round, killed) in [(0, None), (1, Some("old")), (2, Some("new"))] {
        let mut callers = [
            Caller(shop.stack.clients().unwrap()),
            Caller(shop.stack.clients().unwrap()),
        ];
        callers[1].0.loms = new.stranger();
        for number in 0..ORDERS {
            let (one, other) = match number % 2 {
                0 => (&callers[0], &callers[1]),
                _ => (&callers[1], &callers[0]),
            };
            let user = round * ORDERS + number + 1;
            let key = number.to_string();
            let placed = one.create(user, &[(HEART, 1)], &key).await.unwrap();
            let order = placed.into_inner().order_id;
            // the key is known to both, and what one placed the other changes
            let again = other.create(user, &[(HEART, 1)], &key).await.unwrap();
            assert_eq!(again.into_inner().order_id, order);
            match number % 3 {
                0 => drop(other.pay(order).await.unwrap()),
                1 => drop(other.cancel(order).await.unwrap()),
                _ => {}
            }
        }
        let loms = &mut shop.stack.parts().0[1];
        match killed {
            Some("old") => {
                loms.kill().await.unwrap();
                shop.recount("the old one was killed").await;
                let loms = &mut shop.stack.parts().0[1];
                loms.start_again().await.unwrap();
                loms.wait_ready(READY_BOUND).await.unwrap();
            }
            Some(_) => {
                new.signal(nix::sys::signal::Signal::SIGKILL);
                new.ended().await;
                shop.recount("the new one was killed").await;
                new = new.start_again().await;
            }
            None => shop.recount("both run").await,
        }
    }
    new.stop().await;
    shop.stack.stop().await.unwrap();
}
