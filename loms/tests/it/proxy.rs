//! A TCP proxy that can be cut, or go silent: what stands behind it is then away, and later back.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use sqlx::{ConnectOptions as _, PgPool};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::watch,
    task::JoinSet,
};

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    target: String,
    /// Bound and not listening: the port is ours, and whoever connects is refused.
    closed: Option<TcpSocket>,
    running: JoinSet<()>,
    silence: watch::Sender<Silence>,
    /// Behind it is a broker, who must name this address as his.
    renames: bool,
}

#[derive(Clone, Copy, Default)]
struct Silence {
    /// How often it went silent.
    times: u32,
    /// It is silent to new connections too.
    lasts: bool,
}

impl Proxy {
    /// Nobody listens there before [`Proxy::open`].
    pub(crate) fn closed(target: &str) -> Proxy {
        let socket = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a port");
        Proxy {
            address: socket.local_addr().expect("an address"),
            target: target.to_owned(),
            closed: Some(socket),
            running: JoinSet::new(),
            silence: watch::Sender::default(),
            renames: false,
        }
    }

    /// In front of the first of `brokers`, which must be on this machine. A Kafka client goes where the broker says he is:
    /// what he says is changed into another loopback address with his port, and the client comes back here.
    pub(crate) fn before_broker(brokers: &str) -> Proxy {
        let broker = brokers.split(',').next().expect("a broker");
        let port = broker
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse().ok());
        let port: u16 = port.expect("host:port");
        // one digit: an address of another length would not fit where his was
        let free =
            (2..=9).find_map(|last| bind((Ipv4Addr::new(127, 0, 0, last), port).into()).ok());
        let socket = free.expect("a loopback address with the broker's port");
        Proxy {
            address: socket.local_addr().expect("an address"),
            closed: Some(socket),
            renames: true,
            ..Proxy::closed(broker)
        }
    }

    pub(crate) fn open(&mut self) {
        let socket = self.closed.take().expect("a closed proxy");
        let listener = socket.listen(64).expect("a listener");
        let target = self.target.clone();
        let silence = self.silence.subscribe();
        let name = self.renames.then_some(self.address.ip());
        self.running.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut silence) = (target.clone(), silence.clone());
                connections.spawn(async move {
                    let Silence { times, lasts } = *silence.borrow();
                    let Ok(mut far) = TcpStream::connect(target).await else {
                        return;
                    };
                    let ended = tokio::select! {
                        biased;
                        _ = async { silence.wait_for(|now| lasts || now.times > times).await.is_ok() } => false,
                        _ = carry(&mut near, &mut far, name) => true,
                    };
                    // an end that breaks off ends the connection, as it would without a proxy; silence keeps both open
                    if !ended {
                        std::future::pending().await
                    }
                });
            }
        });
    }

    /// Lets every connection that there is hang: open, and nothing comes through. New ones are served.
    pub(crate) fn silence(&self) {
        self.silence.send_modify(|silence| silence.times += 1);
    }

    /// The same, and new connections hang too, until [`Proxy::speak`].
    pub(crate) fn silence_all(&self) {
        self.silence.send_modify(|silence| {
            silence.times += 1;
            silence.lasts = true;
        });
    }

    /// New connections hang, those that there are go on.
    pub(crate) fn silence_new(&self) {
        self.silence.send_modify(|silence| silence.lasts = true);
    }

    /// New connections are served again; the others go on hanging.
    pub(crate) fn speak(&self) {
        self.silence.send_modify(|silence| silence.lasts = false);
    }

    /// Ends every connection and refuses new ones.
    pub(crate) async fn cut(&mut self) {
        self.running.shutdown().await;
        self.closed = Some(bind(self.address).expect("the port again"));
    }
}

/// PostgreSQL as this test's service finds it there, and the connection string.
pub(crate) fn database_behind_proxy(pool: &PgPool) -> (Proxy, String) {
    let options = pool.connect_options();
    let mut database = Proxy::closed(&format!("{}:{}", options.get_host(), options.get_port()));
    database.open();
    let through = (*options)
        .clone()
        .port(database.address.port())
        .host("127.0.0.1");
    (database, through.to_url_lossy().to_string())
}

fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn carry(near: &mut TcpStream, far: &mut TcpStream, name: Option<IpAddr>) -> io::Result<()> {
    let Some(name) = name else {
        return tokio::io::copy_bidirectional(near, far).await.map(drop);
    };
    let ((mut asked, answered), (answers, mut asks)) = (near.split(), far.split());
    tokio::select! {
        done = tokio::io::copy(&mut asked, &mut asks) => done.map(drop),
        done = rename(answers, answered, name.to_string()) => done,
    }
}

/// Kafka's responses: four bytes of length, then as many bytes.
async fn rename(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    name: String,
) -> io::Result<()> {
    loop {
        let length = from.read_u32().await?;
        let mut response = length.to_be_bytes().to_vec();
        (&mut from)
            .take(length.into())
            .read_to_end(&mut response)
            .await?;
        for own in ["127.0.0.1", "localhost"] {
            while let Some(at) = response
                .windows(own.len())
                .position(|part| part == own.as_bytes())
            {
                response[at..at + name.len()].copy_from_slice(name.as_bytes());
            }
        }
        to.write_all(&response).await?;
    }
}
