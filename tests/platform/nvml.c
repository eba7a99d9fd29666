/* The functions of NVML that are called, for a machine without a GPU: two GPUs, of which the second is not well. The
   first knows no ECC, as GeForce cards do. Errors are counted from call to call. */
#include <string.h>

typedef struct { void *device; unsigned long long type, data; unsigned int gpu, compute; } event;
static int first, second, events = 2, calls, subscribed;

int nvmlInit_v2(void) { return 0; }
int nvmlEventSetCreate(void **set) { *set = &events; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    if (!strcmp(uuid, "GPU-a")) { *device = &first; return 0; }
    if (!strcmp(uuid, "GPU-b")) { *device = &second; return 0; }
    return 6;
}
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    if (set != &events || types != 8) return 2;
    subscribed += device == &second;
    return 0;
}
int nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, unsigned long long *count) {
    if (device == &first) return 3;
    if (counter != 0) return 2;
    *count = kind == 1 ? 5 : 100 + 7 * calls;
    return 0;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *degrees) {
    *degrees = device == &first ? 35 : 90;
    return 0;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
    *reasons = device == &first ? 0x5 : 0x44; /* idle and at its power limit; too hot and at its power limit */
    calls++;
    return 0;
}
int nvmlEventSetWait_v2(void *set, event *found, unsigned int milliseconds) {
    if (set != &events || milliseconds != 0 || !subscribed || !events) return 10;
    found->device = &second;
    found->type = 8;
    found->data = 60 + events--;
    return 0;
}
