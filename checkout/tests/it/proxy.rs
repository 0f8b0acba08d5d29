//! A line to a server that can be cut, or go silent.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// What happens to what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// It arrives.
    Up,
    /// It does not, and nobody says so.
    Silent,
    /// Connections are broken off, new ones refused.
    Cut,
}

/// Passes on every connection; dropped, it takes all of them down and refuses new ones.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    target: Arc<Mutex<String>>,
    line: watch::Sender<Line>,
    connections: Arc<AtomicUsize>,
    _accepting: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (line, state) = watch::channel(Line::Up);
        let target = Arc::new(Mutex::new(target));
        let connections = Arc::new(AtomicUsize::new(0));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, target.clone(), state, connections.clone()));
        Self {
            address,
            target,
            line,
            connections,
            _accepting: accepting,
        }
    }

    pub(crate) fn set(&self, line: Line) {
        self.line.send_replace(line);
    }

    /// Breaks all connections off; new ones lead to another server.
    pub(crate) fn lead_to(&self, target: String) {
        *self.target.lock().unwrap() = target;
        self.set(Line::Cut);
    }

    /// How many there have been.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn accept(
    listener: TcpListener,
    target: Arc<Mutex<String>>,
    mut line: watch::Receiver<Line>,
    connections: Arc<AtomicUsize>,
) {
    let address = listener.local_addr().unwrap();
    let mut listener = Some(listener);
    let mut passing = JoinSet::new();
    loop {
        if *line.borrow_and_update() == Line::Cut {
            (listener, passing) = (None, JoinSet::new());
            line.wait_for(|line| *line != Line::Cut).await.unwrap();
        }
        let open = match &listener {
            Some(open) => open,
            None => listener.insert(TcpListener::bind(address).await.unwrap()),
        };
        tokio::select! {
            accepted = open.accept() => {
                let (near, _) = accepted.unwrap();
                let target = target.lock().unwrap().clone();
                let far = TcpStream::connect(target).await.unwrap();
                connections.fetch_add(1, Ordering::SeqCst);
                let (near_in, near_out) = near.into_split();
                let (far_in, far_out) = far.into_split();
                passing.spawn(copy(near_in, far_out, line.clone()));
                passing.spawn(copy(far_in, near_out, line.clone()));
            }
            changed = line.changed() => changed.unwrap(),
        }
    }
}

/// Ends with the connection, or when one side has.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut line: watch::Receiver<Line>,
) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let passes = line.wait_for(|line| *line == Line::Up).await.is_ok();
        if !passes || to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
