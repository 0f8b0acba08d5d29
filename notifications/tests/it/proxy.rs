//! A TCP proxy that can be cut, or go silent: the database behind it is then away, and later back.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use sqlx::{ConnectOptions as _, PgPool};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub(crate) struct Proxy {
    address: SocketAddr,
    target: String,
    /// Bound and not listening: the port is ours, and whoever connects is refused.
    closed: Option<TcpSocket>,
    running: JoinSet<()>,
    /// How often it went silent.
    silenced: watch::Sender<u32>,
    /// The answer to the next COMMIT is not to come through.
    lose_commit: Arc<AtomicBool>,
}

impl Proxy {
    /// In front of the server of `pool`, open.
    pub(crate) fn before(pool: &PgPool) -> Proxy {
        let options = pool.connect_options();
        let socket = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let mut proxy = Proxy {
            address: socket.local_addr().expect("an address"),
            target: format!("{}:{}", options.get_host(), options.get_port()),
            closed: Some(socket),
            running: JoinSet::new(),
            silenced: watch::Sender::new(0),
            lose_commit: Arc::default(),
        };
        proxy.open();
        proxy
    }

    /// The connection string that leads through it.
    pub(crate) fn url(&self, pool: &PgPool) -> String {
        let options = pool.connect_options().as_ref().clone();
        let through = options.host("127.0.0.1").port(self.address.port());
        through.to_url_lossy().to_string()
    }

    pub(crate) fn open(&mut self) {
        let socket = self.closed.take().expect("a closed proxy");
        let listener = socket.listen(64).expect("a listener");
        let (target, silenced) = (self.target.clone(), self.silenced.subscribe());
        let lose_commit = self.lose_commit.clone();
        self.running.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let (target, mut silenced) = (target.clone(), silenced.clone());
                let lose_commit = lose_commit.clone();
                connections.spawn(async move {
                    let before = *silenced.borrow();
                    let Ok(far) = TcpStream::connect(target).await else {
                        return;
                    };
                    tokio::select! {
                        // an end that breaks off ends the connection, as it would without a proxy
                        _ = forward(near, far, &lose_commit) => {}
                        _ = async { silenced.wait_for(|now| *now > before).await.is_ok() } => std::future::pending().await,
                    }
                });
            }
        });
    }

    /// Lets the next transaction that is committed never hear of it, nor anything else on its connection.
    pub(crate) fn lose_commit(&self) {
        self.lose_commit.store(true, Ordering::SeqCst);
    }

    /// Whether that is still to happen.
    pub(crate) fn will_lose_commit(&self) -> bool {
        self.lose_commit.load(Ordering::SeqCst)
    }

    /// Lets every connection that there is hang: open, and nothing comes through. New ones are served.
    pub(crate) fn silence(&self) {
        self.silenced.send_modify(|times| *times += 1);
    }

    /// Ends every connection and refuses new ones.
    pub(crate) async fn cut(&mut self) {
        self.running.shutdown().await;
        self.closed = Some(bind(self.address));
    }
}

/// Carries both directions until one ends.
async fn forward(
    mut near: TcpStream,
    mut far: TcpStream,
    lose_commit: &AtomicBool,
) -> std::io::Result<()> {
    let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.split(), far.split());
    let deaf = CancellationToken::new();
    let questions = async {
        let mut buffer = [0; 16 * 1024];
        loop {
            let read = near_in.read(&mut buffer).await?;
            if read == 0 {
                return std::io::Result::Ok(());
            }
            let commits = buffer[..read].windows(6).any(|word| word == b"COMMIT");
            if commits && lose_commit.swap(false, Ordering::SeqCst) {
                deaf.cancel();
            }
            far_out.write_all(&buffer[..read]).await?;
        }
    };
    let answers = async {
        tokio::select! {
            biased;
            () = deaf.cancelled() => std::future::pending().await,
            copied = tokio::io::copy(&mut far_in, &mut near_out) => copied.map(drop),
        }
    };
    tokio::select! {
        ended = questions => ended,
        ended = answers => ended,
    }
}

fn bind(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("an option");
    socket.bind(address).expect("a port");
    socket
}
