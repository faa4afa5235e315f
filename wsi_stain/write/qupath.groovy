/*
 * QuPath 0.5, 0.6, 0.7: @NAME@
 *
 * Adds an H&E slide and its virtual @MARKER@ to the open project, sets both image types and the
 * model's stain vectors, imports the outlines and tiles, and shows the two side by side, moving
 * together. Run it from Automate > Script editor (drag this file there), with a project open.
 * Asks for two files; changes neither. Running it again adds nothing twice.
 *
 * Virtual stain, research use only.
 */
import javafx.animation.PauseTransition
import javafx.application.Platform
import javafx.util.Duration
import qupath.fx.dialogs.Dialogs
import qupath.fx.dialogs.FileChoosers
import qupath.lib.color.ColorDeconvolutionStains
import qupath.lib.common.GeneralTools
import qupath.lib.gui.QuPathGUI
import qupath.lib.gui.commands.ProjectCommands
import qupath.lib.images.ImageData
import qupath.lib.images.servers.ImageServers
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO

def title = "Virtual @MARKER@, research use only"
def virtualName = "@NAME@"
// Optical density of hematoxylin and DAB, and the white of the glass, as the model makes them.
def virtualStains = '{"Name" : "@NAME@", "Stain 1" : "Hematoxylin", "Values 1" : "@HEMATOXYLIN@", ' +
        '"Stain 2" : "DAB", "Values 2" : "@DAB@", "Background" : "@WHITE@"}'
// The same of the H&E, as it was fitted on this slide; empty where it was not.
def heStains = '@HE_STAINS@'

def version = GeneralTools.getSemanticVersion()
if (version.getMajor() == 0 && version.getMinor() < 5) {
    println "${title}: QuPath ${version} is too old for this script; 0.5 or later is needed."
    return
}
def qupath = QuPathGUI.getInstance()
if (qupath == null) {
    println "${title}: this script needs QuPath's window; it shows two pictures side by side."
    return
}
def project = qupath.getProject()
if (project == null) {
    Dialogs.showErrorMessage(title, "No project is open. Create one first: File > Project > Create project.")
    return
}
def busy = qupath.getViewerManager().getAllViewers().findAll { it.hasServer() }
if (busy.any { it.getImageData().isChanged() }) {
    Dialogs.showErrorMessage(title, "An open image has changes that are not saved. Save it (Ctrl+S), then run this again.")
    return
}
if (busy.size() > 2) {
    Dialogs.showErrorMessage(title, "More than two viewers show an image. Close some, then run this again.")
    return
}

def pyramids = FileChoosers.createExtensionFilter("Virtual stain (OME-TIFF)", "*.tiff", "*.tif")
def virtualFile = FileChoosers.promptForFile("Choose ${virtualName}.ome.tiff".toString(), pyramids)
if (virtualFile == null)
    return
def heFile = FileChoosers.promptForFile("Choose the H&E slide it was made from".toString())
if (heFile == null)
    return

// quantify measures more than translate draws: take its objects where they are, and of this very
// picture, not of an older one of its name.
def base = virtualFile.getName().replaceAll(/(?i)\.ome\.tiff?$/, "")
def folder = virtualFile.getParentFile()
def measured = new File(folder, base + "_quantify")
def numbersFile = new File(measured, "numbers.json")
def isOfThis = numbersFile.isFile() &&
        GsonTools.getInstance().fromJson(numbersFile.getText("UTF-8"), Map.class).get("picture_bytes") == virtualFile.length()
def candidates = [new File(folder, base + ".geojson")]
if (isOfThis)
    candidates.add(0, new File(measured, base + ".geojson"))
def objectFile = candidates.find { it.isFile() }

def addImage = { File file, ImageData.ImageType type ->
    def uri = file.toURI()
    def known = project.getImageList().find { it.getURIs().contains(uri) }
    if (known != null)
        return known
    def server = ImageServers.buildServer(uri)
    try {
        return ProjectCommands.addSingleImageToProject(project, server, type)
    } finally {
        server.close()
    }
}
def settle = { entry, ImageData.ImageType type, String stains, File objects ->
    def imageData = entry.readImageData()
    imageData.setImageType(type)
    if (!stains.isEmpty())
        imageData.setColorDeconvolutionStains(
                ColorDeconvolutionStains.parseColorDeconvolutionStainsArg(stains))
    if (objects != null && imageData.getHierarchy().isEmpty())
        imageData.getHierarchy().addObjects(PathIO.readObjects(objects.toPath()))
    entry.saveImageData(imageData)
    return imageData
}

def heEntry = addImage(heFile, ImageData.ImageType.BRIGHTFIELD_H_E)
def virtualEntry = addImage(virtualFile, ImageData.ImageType.BRIGHTFIELD_H_DAB)
if (heEntry == null || virtualEntry == null) {
    Dialogs.showErrorMessage(title, "QuPath cannot open " + (heEntry == null ? heFile : virtualFile).getName() + ".")
    return
}
def heData = settle(heEntry, ImageData.ImageType.BRIGHTFIELD_H_E, heStains, null)
def virtualData = settle(virtualEntry, ImageData.ImageType.BRIGHTFIELD_H_DAB, virtualStains, objectFile)
project.syncChanges()

Platform.runLater {
    qupath.refreshProject()
    def manager = qupath.getViewerManager()
    manager.setSynchronizeViewers(false)
    if (!manager.setGridSize(1, 2))
        return
    def viewers = manager.getAllViewers()
    manager.setActiveViewer(viewers.get(0))
    viewers.get(0).setImageData(heData)
    viewers.get(1).setImageData(virtualData)
    // The window gives both their halves a moment later: only then is it known what fits.
    def pause = new PauseTransition(Duration.millis(500))
    pause.setOnFinished {
        viewers.get(0).zoomToFit()
        viewers.get(1).zoomToFit()
        // Both show their whole field, which is the same, at the same scale in um, and move together.
        manager.matchResolutions()
        manager.setSynchronizeViewers(true)
    }
    pause.play()
}
println "${title}: ${virtualData.getHierarchy().nObjects()} objects" +
        (objectFile == null ? "; no ${base}.geojson lies beside the picture." : " from ${objectFile.getName()}.")
