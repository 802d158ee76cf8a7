//! The threads that kernels share their work with.
//!
//! A launch of a decoding step takes some microseconds: less than waking a thread, and not much more than the queues of a
//! general pool take to pass a job on. So a crew is led by the thread that wants the work done, which does its part itself;
//! its helpers look for a job in a place of their own, and go to sleep only when none has come for a while.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle, park, yield_now};

/// Looks for a job between two offers of the core to other programs, about 0.2 ms. One that is given the core keeps it for
/// milliseconds, so it is given only when a thread has waited longer than the launches take that run on one thread.
const SPINS: u32 = 4096;
/// Offers of the core until a helper sleeps.
const OFFERS: u32 = 8;

/// Work that several threads do together.
struct Job<'a> {
    /// Takes the number of the worker.
    run: &'a (dyn Fn(usize) + Sync),
    /// What a helper panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What belongs to one worker. Cache lines of its own, as others look at theirs all the time.
#[derive(Default)]
#[repr(align(128))]
struct Slot {
    /// The job it has to do; null when it has none. The leader keeps the job alive until the helper has made this null.
    job: AtomicPtr<Job<'static>>,
    /// Whether it must be woken.
    asleep: AtomicBool,
    /// The next task of its share.
    next: AtomicUsize,
}

struct Common {
    /// One for each worker; that of the leader is the first.
    slots: Vec<Slot>,
    /// Whether the helpers go home.
    over: AtomicBool,
}

/// A fixed number of threads, one of which is whoever leads them.
pub struct Crew {
    common: Arc<Common>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the thread that leads.
    turn: Mutex<()>,
}

thread_local! {
    /// The crew that this thread leads and that has no job.
    static LED: Cell<*const Crew> = const { Cell::new(null()) };
}

/// Makes the old crew the led one again.
struct Before(*const Crew);

impl Drop for Before {
    fn drop(&mut self) {
        LED.set(self.0);
    }
}

impl Crew {
    /// A crew of `threads` threads, of which `threads - 1` are started.
    ///
    /// # Errors
    /// That of the system, if a thread cannot be started.
    pub fn new(threads: usize) -> std::io::Result<Crew> {
        let threads = threads.max(1);
        let slots = (0..threads).map(|_| Slot::default()).collect();
        let common = Arc::new(Common { slots, over: AtomicBool::new(false) });
        let mut crew = Crew { common, helpers: Vec::with_capacity(threads - 1), turn: Mutex::new(()) };
        for worker in 1..threads {
            let common = Arc::clone(&crew.common);
            let named = Builder::new().name(format!("moebius-cpu-{worker}"));
            crew.helpers.push(named.spawn(move || help(&common, worker))?);
        }
        Ok(crew)
    }

    /// Its threads, the leader included.
    pub fn threads(&self) -> usize {
        self.common.slots.len()
    }

    /// Runs `f` on this thread; kernels that it calls share their work with the helpers. Waits until no other thread leads.
    pub fn lead<R>(&self, f: impl FnOnce() -> R) -> R {
        if std::ptr::eq(LED.get(), self) {
            return f();
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let _before = Before(LED.replace(self));
        f()
    }

    /// Gives the helpers up to `count` a job, does worker 0's part, and waits for theirs.
    fn together(&self, count: usize, run: &(dyn Fn(usize) + Sync)) {
        let job = Job { run, panic: Mutex::new(None) };
        let slots = &self.common.slots[1..count];
        for (slot, helper) in slots.iter().zip(&self.helpers) {
            // Both in the one order of all such accesses: either this sees the helper asleep or that sees the job.
            slot.job.store((&raw const job).cast_mut().cast(), Ordering::SeqCst);
            if slot.asleep.load(Ordering::SeqCst) {
                helper.thread().unpark();
            }
        }
        // The job lies on this stack, so a panic has to wait too.
        let own = catch_unwind(AssertUnwindSafe(|| run(0)));
        for slot in slots {
            let mut looks = 0u32;
            while !slot.job.load(Ordering::Acquire).is_null() {
                looks += 1;
                if looks.is_multiple_of(SPINS) { yield_now() } else { std::hint::spin_loop() }
            }
        }
        let theirs = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.common.over.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A panic of a job is the leader's.
            drop(helper.join());
        }
    }
}

/// Does what comes until the crew is over.
fn help(common: &Common, worker: usize) {
    let slot = &common.slots[worker];
    while let Some(job) = slot.wait(&common.over) {
        // SAFETY: the leader keeps it alive until the slot is empty.
        let job = unsafe { &*job };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.run)(worker))) {
            *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        slot.job.store(null_mut(), Ordering::Release);
    }
}

impl Slot {
    /// The next job; `None` when the crew is over.
    fn wait(&self, over: &AtomicBool) -> Option<*const Job<'static>> {
        let mut looks = 0u32;
        loop {
            let job = self.job.load(Ordering::Acquire);
            if !job.is_null() {
                return Some(job);
            }
            looks += 1;
            if !looks.is_multiple_of(SPINS) {
                std::hint::spin_loop();
                continue;
            }
            if over.load(Ordering::SeqCst) {
                return None;
            }
            if looks < SPINS * OFFERS {
                yield_now();
                continue;
            }
            looks = 0;
            self.asleep.store(true, Ordering::SeqCst);
            while self.job.load(Ordering::SeqCst).is_null() && !over.load(Ordering::SeqCst) {
                park();
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
    }
}

/// Threads that a kernel called on this thread can share its work with, this one included: 1 if it leads no crew.
pub fn threads() -> usize {
    // SAFETY: a crew that is led is alive.
    unsafe { LED.get().as_ref() }.map_or(1, Crew::threads)
}

/// Calls `run(worker)` for the workers 0..count, each on a thread of its own if the crew that this thread leads has so
/// many, else one after another on this thread. What they share out further themselves is not shared.
pub(crate) fn together(count: usize, run: &(dyn Fn(usize) + Sync)) {
    if count <= 1 || count > threads() {
        return (0..count).for_each(run);
    }
    let before = Before(LED.replace(null()));
    // SAFETY: a crew that is led is alive; this thread led one, as there are threads.
    unsafe { &*before.0 }.together(count, run);
}

/// Calls `run(worker, task)` for the tasks 0..count on at most `workers` threads, as [`share_with`] does.
pub(crate) fn share(workers: usize, count: usize, run: impl Fn(usize, usize) + Sync) {
    shares(workers, count, &|worker, tasks| {
        for task in tasks {
            run(worker, task);
        }
    });
}

/// Calls `run(state, task)` for the tasks 0..count on at most `workers` threads; each has a state of its own, made by
/// `start(worker)`.
pub(crate) fn share_with<S>(
    workers: usize,
    count: usize,
    start: impl Fn(usize) -> S + Sync,
    run: impl Fn(&mut S, usize) + Sync,
) {
    shares(workers, count, &|worker, tasks| {
        let mut state = start(worker);
        for task in tasks {
            run(&mut state, task);
        }
    });
}

/// Calls `run(worker, tasks)` on at most `workers` threads, which together draw each of the tasks 0..count once. Each worker has a
/// share of neighbouring tasks, the same one in each launch of this shape, so that a thread finds in its caches what it has just
/// written; who is done takes tasks of the others. The tasks of one share are drawn in rising order.
///
/// Compiled once: kernels, of which there are hundreds of instances, only bring what is to be run.
fn shares(workers: usize, count: usize, run: &(dyn Fn(usize, &mut dyn Iterator<Item = usize>) + Sync)) {
    let workers = workers.min(count).min(threads());
    // SAFETY: a crew that is led is alive.
    let Some(crew) = unsafe { LED.get().as_ref() }.filter(|_| workers > 1) else {
        return run(0, &mut (0..count));
    };
    let slots = &crew.common.slots[..workers];
    let first = |worker: usize| count * worker / workers;
    for (worker, slot) in slots.iter().enumerate() {
        slot.next.store(first(worker), Ordering::Relaxed);
    }
    together(workers, &|worker| {
        let share = |of: usize| {
            let next = move || slots[of].next.fetch_add(1, Ordering::Relaxed);
            std::iter::repeat_with(next).take_while(move |task| *task < first(of + 1))
        };
        run(worker, &mut (worker..workers).chain(0..worker).flat_map(share));
    });
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_worker_has_a_thread_of_its_own() {
        let crew = Crew::new(4).unwrap();
        crew.lead(|| {
            assert_eq!(threads(), 4);
            for count in [4, 1, 3, 2] {
                // All wait for all: with fewer threads this never ends.
                let (all, seen) = (Barrier::new(count), Mutex::new(HashSet::new()));
                together(count, &|worker| {
                    all.wait();
                    assert_eq!(threads(), if count == 1 { 4 } else { 1 });
                    seen.lock().unwrap().insert((worker, std::thread::current().id()));
                });
                let seen = seen.into_inner().unwrap();
                assert_eq!(seen.iter().map(|s| s.0).collect::<HashSet<_>>(), (0..count).collect());
                assert_eq!(seen.iter().map(|s| s.1).collect::<HashSet<_>>().len(), count);
            }
        });
        assert_eq!(threads(), 1);
        // Without a crew, and with more workers than threads, one after another.
        let order = Mutex::new(Vec::new());
        together(5, &|worker| order.lock().unwrap().push(worker));
        crew.lead(|| together(5, &|worker| order.lock().unwrap().push(worker)));
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
    }

    #[test]
    fn every_task_is_run_once_also_after_sleep() {
        let crew = Crew::new(3).unwrap();
        for round in 0..200 {
            if round % 50 == 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
            for count in [0, 1, 2, 3, 7, 100] {
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                crew.lead(|| {
                    share(2, count, |worker, task| {
                        assert!(worker < 2);
                        runs[task].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_of_any_worker_reaches_the_leader_and_the_crew_goes_on() {
        let crew = Crew::new(2).unwrap();
        for bad in 0..2 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                crew.lead(|| together(2, &|worker| assert!(worker != bad, "worker {worker}")));
            }));
            let message = caught.unwrap_err();
            assert_eq!(message.downcast_ref::<String>(), Some(&format!("worker {bad}")));
            assert_eq!(threads(), 1);
        }
        let sum = AtomicUsize::new(0);
        crew.lead(|| {
            share(2, 10, |_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn threads_lead_a_crew_in_turn() {
        let (crew, leading) = (Crew::new(2).unwrap(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        crew.lead(|| {
                            assert_eq!(leading.fetch_add(1, Ordering::SeqCst), 0);
                            crew.lead(|| together(2, &|_| ()));
                            leading.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
    }
}
