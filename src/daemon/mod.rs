//! The daemon: start with what the command line says, serve, stop cleanly.
//!
//! Its face is qemu-storage-daemon's: the same options in the same order, the same messages, the same
//! signals. Everything runs on the one thread that calls [`run`]; what is served is in [`crate::qmp`] and
//! below.

mod background;
pub mod command_line;
mod face;
pub mod log;
mod notify;
mod pid_file;
mod signals;
mod startup;

use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;
use std::task::Poll;

use serde_json::json;

use command_line::{Item, Request};
use pid_file::PidFile;
use signals::Signals;
use startup::{Outcome, Startup};

pub use face::Face;

use crate::qmp::commands::Context;
use crate::runtime::{Config, Handle, PollPolicy, Runtime};

/// The program's name in messages.
const NAME: &str = "liveblkd";

/// Where root keeps what is not in images.
const STATE_DIRECTORY: &str = "/var/lib/liveblk";

const HELP: &str = "\
Usage: liveblkd [options]
Serves chains of disk images and rearranges them while they are in use.

  -h, --help             display this help and exit
  -V, --version          output version information and exit

  --blockdev [driver=]<driver>[,node-name=<N>][,read-only=on|off]
             [,auto-read-only=on|off][,force-share=on|off]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,detect-zeroes=on|off|unmap][,discard=ignore|unmap]
             [,driver specific parameters...]
                         open a node: file, host_device, null-co, qcow2, raw

  --chardev socket,id=<id>,path=<path>[,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,host=<host>,port=<port>[,server=on|off][,wait=on|off]
  --chardev stdio,id=<id>
                         a channel for a monitor

  --export [type=]ublk,id=<id>,node-name=<node>[,writable=on|off]
           [,device-id=<number>][,queues=<number>][,queue-depth=<number>]
           [,zero-copy=auto|on|off][,logical-block-size=512|4096]
                         show a node as /dev/ublkb<number>
  --export [type=]nbd,id=<id>,node-name=<node>[,name=<name>]
           [,description=<text>][,writable=on|off][,writethrough=on|off]
           [,allocation-depth=on|off]
                         show a node over NBD (needs --nbd-server)

  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         serve QMP on a channel

  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<number>]
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,max-connections=<number>]
                         listen for NBD clients

  --object iothread,id=<id>[,poll-max-ns=<n>][,poll-grow=<n>][,poll-shrink=<n>]
                         tune the I/O thread: how long it looks for requests
                         before it sleeps
  --object secret,id=<id>,data=<text>|file=<path>[,format=raw|base64]
                         make an object

  --daemonize            return when everything is set up, serve in the background
  --pidfile <path>       write the process id to a file when everything is set up
  --state-dir <path>     keep persistent bitmaps of raw images and devices there
                         (default: $STATE_DIRECTORY, or as root
                         /var/lib/liveblk; an empty one: nowhere)

Options are carried out in the order given; each may also be JSON. The commands
of the QMP socket are described in docs/qmp.md. LIVEBLK_LOG sets what is logged
(for example LIVEBLK_LOG=debug).
";

/// Runs the daemon with the arguments after the program's name.
pub fn run(arguments: impl IntoIterator<Item = String>) -> ExitCode {
    let items = match command_line::parse(arguments) {
        Ok(Request::Serve(items)) => items,
        Ok(Request::Help) => return show(HELP.trim_end()),
        Ok(Request::Version) => return show(&version()),
        Err(text) => return fail(&text),
    };
    if items.contains(&Item::Daemonize) {
        if !background::is_background() {
            return background::start().unwrap_or_else(|text| fail(&text));
        }
        if let Err(text) = background::detach() {
            return fail(&text);
        }
    }
    serve(items, Face::of_daemon(NAME))
}

/// Serves what the options say, in this process, until told to stop. `--daemonize` is not for here.
pub fn serve(items: Vec<Item>, face: Face) -> ExitCode {
    leave_mounts_alone();
    let config = Config {
        polling: PollPolicy::for_this_machine(),
        ..Config::default()
    };
    let runtime = match Runtime::new(&config) {
        Ok(runtime) => runtime,
        Err(error) => return face.fail(error.message()),
    };
    let handle = runtime.handle();
    runtime.block_on(Daemon::new(&handle, face).run(items))
}

/// File systems on the daemon's own devices must not be mounted where the daemon is: ending would wait for
/// them, and they for the daemon.
fn leave_mounts_alone() {
    #[cfg(feature = "ublk")]
    if std::path::Path::new("/dev/ublk-control").exists()
        && nix::unistd::geteuid().is_root()
        && let Err(error) = crate::export::ublk::isolate_mounts()
    {
        tracing::warn!(%error, "no mount namespace of its own: unmount file systems before ending the daemon");
    }
}

/// The text of `--version`.
pub fn version() -> String {
    let own = env!("CARGO_PKG_VERSION");
    format!("liveblkd version {own} (QMP and options of qemu-storage-daemon 10.0.2)")
}

/// A message on standard error.
fn report(text: &str) {
    eprintln!("{NAME}: {text}");
}

fn fail(text: &str) -> ExitCode {
    report(text);
    ExitCode::FAILURE
}

fn show(text: &str) -> ExitCode {
    println!("{text}");
    ExitCode::SUCCESS
}

struct Daemon {
    handle: Handle,
    context: std::rc::Rc<Context>,
    startup: Startup,
    face: Face,
}

impl Daemon {
    fn new(handle: &Handle, face: Face) -> Daemon {
        let context = Context::new(handle);
        Daemon {
            handle: handle.clone(),
            startup: Startup::new(handle, &context),
            context,
            face,
        }
    }

    async fn run(mut self, items: Vec<Item>) -> ExitCode {
        let signals = match Signals::catch(&self.handle) {
            Ok(signals) => signals,
            Err(error) => return self.face.fail(error.message()),
        };

        match race(self.start(&items), signals.wait()).await {
            First::Left(Ok(Started::Ready(pid_file))) => {
                race(self.context.wait_for_quit(), signals.wait()).await;
                self.stop(pid_file).await
            }
            First::Left(Ok(Started::Shown)) => ExitCode::SUCCESS,
            First::Left(Err(text)) => {
                self.context.shut_down().await;
                self.face.fail(&text)
            }
            First::Right(()) => self.stop(None).await,
        }
    }

    /// Carries out the options.
    async fn start(&mut self, items: &[Item]) -> Result<Started, String> {
        self.context.set_state_directory(state_directory(items));
        for item in items {
            match self.startup.apply(item).await {
                Ok(Outcome::Continue) => {}
                Ok(Outcome::Show(text)) => {
                    show(&text);
                    return Ok(Started::Shown);
                }
                Err(error) => return Err(self.face.about(item, &error)),
            }
        }
        let pid_file = self.startup.finish()?;
        if items.contains(&Item::Daemonize) {
            background::announce()?;
        }
        let exports = self.context.execute("query-block-exports", json!({})).await;
        self.face.announce(&exports.unwrap_or_default())?;
        notify::ready();
        tracing::info!("ready");
        Ok(Started::Ready(pid_file))
    }

    async fn stop(&self, pid_file: Option<PidFile>) -> ExitCode {
        tracing::info!("stopping");
        notify::stopping();
        let clean = self.context.shut_down().await;
        for monitor in &self.startup.monitors {
            monitor.close().await;
        }
        drop(pid_file);
        match clean {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }
    }
}

/// What the command line says last, wherever it stands; else what systemd says, or where it would be.
fn state_directory(items: &[Item]) -> Option<PathBuf> {
    let given = items.iter().rev().find_map(|item| match item {
        Item::StateDirectory(path) => Some(PathBuf::from(path)),
        _ => None,
    });
    let by_systemd = || {
        let all = std::env::var_os("STATE_DIRECTORY")?;
        std::env::split_paths(&all).next()
    };
    let by_default = || {
        nix::unistd::geteuid()
            .is_root()
            .then(|| STATE_DIRECTORY.into())
    };
    let directory = given.or_else(by_systemd).or_else(by_default);
    let directory = directory.filter(|path| !path.as_os_str().is_empty())?;
    // A daemon in the background is somewhere else.
    Some(std::path::absolute(&directory).unwrap_or(directory))
}

enum Started {
    Ready(Option<PidFile>),
    /// Something was shown instead.
    Shown,
}

enum First<A, B> {
    Left(A),
    Right(B),
}

/// Waits for the first of two, and drops the other.
async fn race<A, B>(left: impl Future<Output = A>, right: impl Future<Output = B>) -> First<A, B> {
    let (mut left, mut right) = (pin!(left), pin!(right));
    poll_fn(|context| {
        if let Poll::Ready(output) = left.as_mut().poll(context) {
            return Poll::Ready(First::Left(output));
        }
        right.as_mut().poll(context).map(First::Right)
    })
    .await
}
