/* A process whose clock is wrong by SKEW_S seconds: loaded before libc (LD_PRELOAD).
   Clocks that only run forward (monotonic) are right. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static double skew(void) {
    static double seconds = NAN;
    if (isnan(seconds)) {
        const char *given = getenv("SKEW_S");
        seconds = given ? atof(given) : 0.0;
    }
    return seconds;
}

static void shift(struct timespec *t, double by) {
    double whole = floor(by);
    t->tv_sec += (time_t)whole;
    t->tv_nsec += (long)((by - whole) * 1e9);
    if (t->tv_nsec >= 1000000000L) {
        t->tv_nsec -= 1000000000L;
        t->tv_sec += 1;
    }
}

int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, t);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) shift(t, skew());
    return failed;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

/* Until when it waits is told by the wrong clock, and looked up on the right one. */
int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real) real = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec right = *until;
    shift(&right, -skew());
    return real(sem, &right);
}
