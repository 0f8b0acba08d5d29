//! A line between two parties that can hold what goes one way, or break off.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

/// What is held on the way. It arrives when nothing is held any more, even if its sender has died since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    Nothing,
    /// What the caller says.
    Requests,
    /// What the other end answers.
    Answers,
}

/// Passes on every connection to its target.
pub(crate) struct Line {
    pub(crate) address: SocketAddr,
    held: watch::Sender<Held>,
    /// Raised to break off the connections there are.
    breaks: watch::Sender<u64>,
    waiting: Arc<AtomicUsize>,
    _accepting: JoinSet<()>,
}

impl Line {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (held, holding) = watch::channel(Held::Nothing);
        let (breaks, breaking) = watch::channel(0);
        let waiting = Arc::new(AtomicUsize::new(0));
        let mut accepting = JoinSet::new();
        let counted = waiting.clone();
        accepting.spawn(async move {
            let mut passing = JoinSet::new();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                // the target is killed now and then; its caller sees the line break
                let Ok(far) = TcpStream::connect(target).await else {
                    continue;
                };
                let (holding, mut breaking) = (holding.clone(), breaking.clone());
                let counted = counted.clone();
                breaking.mark_unchanged();
                passing.spawn(async move {
                    let ((near_in, near_out), (far_in, far_out)) =
                        (near.into_split(), far.into_split());
                    let there = copy(near_in, far_out, Held::Requests, holding.clone(), &counted);
                    let back = copy(far_in, near_out, Held::Answers, holding, &counted);
                    tokio::select! {
                        _ = futures::future::join(there, back) => {}
                        _ = breaking.changed() => {}
                    }
                });
            }
        });
        Self {
            address,
            held,
            breaks,
            waiting,
            _accepting: accepting,
        }
    }

    pub(crate) fn hold(&self, held: Held) {
        self.held.send_replace(held);
    }

    /// Whether something is being held.
    pub(crate) fn is_holding(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Breaks off every connection; what is held is lost. New ones are passed on.
    pub(crate) fn cut(&self) {
        self.breaks.send_modify(|breaks| *breaks += 1);
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    way: Held,
    mut held: watch::Receiver<Held>,
    waiting: &AtomicUsize,
) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let _waiting = (*held.borrow() == way).then(|| Waiting::one(waiting));
        let passes = held.wait_for(|held| *held != way).await.is_ok();
        if !passes || to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// Counted as waiting until dropped, also when the line breaks.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn one(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::SeqCst);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
