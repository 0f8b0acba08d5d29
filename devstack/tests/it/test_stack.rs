//! A stack for a test, which must be finished: a test that forgets to look at the audit fails.

use std::{fmt::Write as _, future::Future, path::Path, time::Duration};

use devstack::{
    binaries::Binaries,
    clients::Clients,
    stack::{Options, Stack},
};
use serde_json::Value;
use tokio::{sync::OnceCell, time::Instant};

/// A condition that many processes and a broker stand behind, on a machine that also compiles.
const PATIENCE: Duration = Duration::from_secs(120);

static BUILT: OnceCell<()> = OnceCell::const_new();

/// The devstack under test.
pub(crate) const DEVSTACK: &str = env!("CARGO_BIN_EXE_devstack");

/// The services beside it, built.
pub(crate) async fn binaries() -> Binaries {
    let binaries = Binaries::beside(DEVSTACK);
    BUILT
        .get_or_init(async || binaries.build().await.expect("the services build"))
        .await;
    binaries
}

pub(crate) struct TestStack {
    stack: Option<Stack>,
    pub(crate) clients: Clients,
}

impl TestStack {
    /// A stack with `stock` (warehouse, SKU, count) received.
    pub(crate) async fn start(stock: &[(i64, u32, u64)]) -> TestStack {
        TestStack::start_with(Value::Null, stock).await
    }

    /// One whose services have `settings` besides their own.
    pub(crate) async fn start_with(settings: Value, stock: &[(i64, u32, u64)]) -> TestStack {
        let options = Options {
            quiet: true,
            settings,
            ..Options::new(binaries().await)
        };
        let stack = Stack::start(&options).await.expect("the stack starts");
        if !stock.is_empty() {
            receive(&stack, stock).await;
        }
        let clients = stack.clients().expect("clients");
        TestStack {
            stack: Some(stack),
            clients,
        }
    }

    /// The stack itself, to look into it and to take parts away.
    pub(crate) fn stack(&mut self) -> &mut Stack {
        self.stack.as_mut().expect("not finished yet")
    }

    /// Every unit is accounted for, every service stops cleanly.
    pub(crate) async fn finish(mut self) {
        let stack = self.stack.take().expect("finished once");
        let audit = stack
            .command("loms", &["audit"])
            .await
            .expect("the audit runs");
        assert!(audit.status.success(), "{}\n{}", audit.stdout, audit.stderr);
        stack.stop().await.expect("the stack stops");
    }
}

async fn receive(stack: &Stack, stock: &[(i64, u32, u64)]) {
    let mut csv = "warehouse_id,sku,count\n".to_owned();
    for (warehouse, sku, count) in stock {
        writeln!(csv, "{warehouse},{sku},{count}").unwrap();
    }
    let file = stack.dir().join("delivery.csv");
    std::fs::write(&file, csv).unwrap();
    stack
        .receive_stock(&file)
        .await
        .expect("the stock is received");
}

impl Drop for TestStack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Some(stack) = &self.stack {
                eprintln!("{}", stack.logs());
            }
        } else {
            assert!(self.stack.is_none(), "the test did not finish its stack");
        }
    }
}

/// Waits until `condition` holds, with a bound.
pub(crate) async fn eventually<F: Future<Output = bool>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) {
    let by = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < by, "never: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// devstack's command line, its services built, with or without the server that the tests use.
pub(crate) async fn devstack(arguments: &[&str], dir: &Path) -> std::process::Output {
    binaries().await;
    let command = tokio::process::Command::new(DEVSTACK)
        .args(arguments)
        .current_dir(dir)
        .kill_on_drop(true)
        .output();
    command.await.expect("devstack runs")
}
